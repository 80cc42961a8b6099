"""summary.json: what a finished run's lines come to, what it cost, and who the clients are."""

from collections.abc import Mapping, Sequence
from typing import Any

from fedtri.config import Config
from fedtri.metrics import ACCURACY, LOSS, ONCE, STAGES, spread


def summary(
    config: Config,
    lines: Sequence[Mapping[str, Any]],
    *,
    method: Mapping[str, Any],
    payload: int,
    numbers: int,
    clients: Mapping[str, Mapping[str, object]],
    labels: Sequence[str],
    executor: str | None = None,
) -> dict[str, Any]:
    """The result of a run as a table of plain values.

    Args:
        config: The run's configuration.
        lines: The lines of rounds.jsonl.
        method: The method's name and paper, as `Method.described` gives them.
        payload: The bytes of the numbers alone that one client sends in a round.
        numbers: How many numbers these are.
        clients: What is known of each client's data.
        labels: The names of the classes in the order of their ids.
        executor: Which executor trained the clients, and why no faster one; None: not known here, as on a server.
    """
    guesses = [float(str(about["guess"])) for about in clients.values() if about.get("guess") is not None]
    return {
        "method": method["name"],
        "paper": method["paper"],
        "model": config.model,
        "task": config.task,
        "data": config.data,
        "partition": config.partition,
        "executor": executor,
        "rounds": len(lines),
        "clients": len(clients),
        "accuracy": spread(ACCURACY, latest(lines, "accuracy")),
        "accuracy_local": spread(ACCURACY, latest(lines, "accuracy_local")),
        "test_loss": spread(LOSS, latest(lines, "test_loss")),
        "metrics": {name: values for line in lines for name, values in line.get("metrics", {}).items()},
        "guess": sum(guesses) / len(guesses) if guesses else None,
        "bytes": _bytes(lines, payload, numbers),
        "seconds": _seconds(lines),
        "labels": list(labels),
        "client_table": clients,
    }


def latest(lines: Sequence[Mapping[str, Any]], name: str) -> dict[str, float]:
    """Each client's last known value of a metric."""
    found: dict[str, float] = {}
    for line in lines:
        found |= (line.get(name) or {}).get("clients", {})
    return found


def _bytes(lines: Sequence[Mapping[str, Any]], payload: int, numbers: int) -> dict[str, int]:
    # A client that was not drawn may still be scored, and is then sent all that it missed: no typical round.
    ups = [n for line in lines for n in line["bytes"]["up"].values()]
    downs = [n for line in lines for c, n in line["bytes"]["down"].items() if c in line["clients"]]
    bases, sketches = ([n for line in lines for n in line["bytes"].get(w, {}).values()] for w in ONCE)
    return {
        "up_per_client_round": round(sum(ups) / max(len(ups), 1)),
        "down_per_client_round": round(sum(downs) / max(len(downs), 1)),
        "payload_up_per_client_round": payload,
        "numbers_up_per_client_round": numbers,
        "basis_per_client": round(sum(bases) / max(len(bases), 1)),
        "sketch_per_client": round(sum(sketches) / max(len(sketches), 1)),
        "total": sum(ups) + sum(n for line in lines for n in line["bytes"]["down"].values()) + sum(bases + sketches),
    }


def _seconds(lines: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    by_stage = {stage: round(sum(line["seconds"].get(stage, 0.0) for line in lines), 3) for stage in STAGES}
    return {"total": round(sum(sum(line["seconds"].values()) for line in lines), 3), **by_stage}
