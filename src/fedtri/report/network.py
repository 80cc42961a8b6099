"""What a run on a real network tells of each client: how long it took, and what went wrong, as the server says it."""

import math

import pandas as pd

from fedtri.report.names import duration
from fedtri.report.reading import Run, number

KINDS = {"failed": "no answer", "refused": "refused"}


def latency(run: Run) -> pd.DataFrame:
    """One row per client: seconds from sending its task to its answer, median and largest, and how often it was asked
    again, did not answer, or was refused. Empty for a run in one process.
    """
    found: dict[str, list[float]] = {}
    counts: dict[str, dict[str, int]] = {}
    for line in run.lines:
        for client, phases in _table(line.get("latency")).items():
            found.setdefault(client, []).extend(s for s in map(number, _table(phases).values()) if math.isfinite(s))
        for client, times in _table(line.get("retries")).items():
            _count(counts, client, "asked again", int(number(times)))
    for event in events(run).to_dict("records"):
        _count(counts, event["client"], event["what"], 1)
    rows = []
    for client in sorted({*found, *counts}):
        times = pd.Series(found.get(client, []), dtype=float)
        own = counts.get(client, {})
        rows.append({
            "client": client,
            "median": duration(float(times.median())) if len(times) else "–",
            "slowest": duration(float(times.max())) if len(times) else "–",
            **{what: own.get(what, 0) for what in ("asked again", *KINDS.values())},
        })  # fmt: skip
    return pd.DataFrame(rows)


def events(run: Run) -> pd.DataFrame:
    """One row each time a client gave no answer, or an answer that was refused: round, client, what, why."""
    rows = []
    for line in run.lines:
        reasons = [("failed", str(why)) for why in _table(line.get("failed")).values()]
        refused = line.get("refused")
        reasons += [("refused", str(why)) for why in (refused if isinstance(refused, list) else [])]
        for kind, reason in reasons:
            client, _, why = reason.partition(": ")
            rows.append({"round": line["round"], "client": client, "what": KINDS[kind], "why": why})
    return pd.DataFrame(rows, columns=["round", "client", "what", "why"])


def _table(value: object) -> dict:
    return value if isinstance(value, dict) else {}


def _count(counts: dict[str, dict[str, int]], client: str, what: str, times: int) -> None:
    own = counts.setdefault(client, {})
    own[what] = own.get(what, 0) + times
