"""Runs compared: one group for each method and grid point, mean ± standard deviation over seeds, paired differences.

The interval of a paired difference d over n seeds is mean(d) ± t(0.975, n − 1) · std(d) / √n (Student).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from fedtri.errors import FedtriError
from fedtri.report.names import amount, duration, points, share
from fedtri.report.reading import Run, comparison

COLUMNS = (
    "method", "data", "partition", "seeds", "accuracy_mean", "accuracy_std", "worst_mean", "best_mean",
    "bytes_up_per_client_round", "bytes_per_client", "bytes_total", "seconds",
)  # fmt: skip
NOT_SETTINGS = {"method", "seed", "out"}


@dataclass(frozen=True)
class Group:
    """The runs of one method at one grid point, by seed."""

    method: str
    point: Mapping[str, Any]
    """The settings in which the compared runs of one method differ."""
    runs: Mapping[int, Run]

    @property
    def label(self) -> str:
        """The method's name in its paper, and the grid point."""
        at = ", ".join(f"{key} {value}" for key, value in self.point.items() if value is not None)
        return self.paper + (f" ({at})" if at else "")

    @property
    def paper(self) -> str:
        """The method's name in its paper."""
        return next(iter(self.runs.values())).paper

    def over_seeds(self, measure: str) -> dict[int, float]:
        """A measure of each seed's run: "mean", "worst" or "best" accuracy over clients, "bytes_up", "seconds", …"""
        return {seed: _measure(run, measure) for seed, run in self.runs.items()}

    def mean(self, measure: str) -> float:
        """Mean over the seeds where it is known."""
        known = _known(self.over_seeds(measure).values())
        return float(np.mean(known)) if known else math.nan

    def std(self, measure: str) -> float:
        """Standard deviation over seeds (n − 1); NaN for fewer than two."""
        known = _known(self.over_seeds(measure).values())
        return float(np.std(known, ddof=1)) if len(known) > 1 else math.nan

    def half_interval(self) -> float:
        """Half of the 95 % interval of the mean accuracy over seeds: t(0.975, n − 1) · std / √n; NaN for one seed."""
        count = len(_known(self.over_seeds("mean").values()))
        return float(stats.t.ppf(0.975, count - 1)) * self.std("mean") / math.sqrt(count) if count > 1 else math.nan

    def standard_error(self) -> float:
        """Of the mean accuracy over clients, in the first seed's run: std(clients) / √clients; NaN for one client."""
        scores = list(self.runs[min(self.runs)].latest("accuracy").values())
        return float(np.std(scores, ddof=1)) / math.sqrt(len(scores)) if len(scores) > 1 else math.nan


@dataclass(frozen=True)
class Difference:
    """Accuracy minus the baseline's, paired by seed, with its 95 % interval; NaN for one seed."""

    mean: float
    low: float
    high: float
    seeds: int

    def __str__(self) -> str:
        if not self.seeds:
            return "–"
        if math.isnan(self.low):
            return f"{points(self.mean)} (one seed)"
        return f"{points(self.mean)} [{points(self.low)}, {points(self.high)}]"


def grouped(runs: Sequence[Run]) -> list[Group]:
    """The runs by method and by the settings in which runs of one method differ, in the order given."""
    settings = [_flat(run.config) for run in runs]
    methods = [run.method for run in runs]
    names = sorted({key for own in settings for key in own})
    differ = [key for key in names if _differs(key, methods, settings)]
    found: dict[tuple[Any, ...], dict[int, Run]] = {}
    points: dict[tuple[Any, ...], dict[str, Any]] = {}
    for run, own in zip(runs, settings, strict=True):
        point = {key: own.get(key) for key in differ}
        key = (run.method, *map(str, point.values()))
        if run.seed in found.get(key, {}):  # the same thing run twice: kept apart by folder
            point["folder"] = run.folder.name
            key = (*key, str(run.folder))
        found.setdefault(key, {})[run.seed] = run
        points[key] = point
    return [Group(found[key][min(found[key])].method, points[key], dict(sorted(found[key].items()))) for key in found]


def paired(group: Group, baseline: Group, measure: str = "mean") -> Difference:
    """The group's measure minus the baseline's, over the seeds that both have."""
    own, other = group.over_seeds(measure), baseline.over_seeds(measure)
    gaps = _known(own[seed] - other[seed] for seed in own if seed in other)
    if len(gaps) < 2:
        return Difference(gaps[0] if gaps else math.nan, math.nan, math.nan, len(gaps))
    mean, std = float(np.mean(gaps)), float(np.std(gaps, ddof=1))
    half = float(stats.t.ppf(0.975, len(gaps) - 1)) * std / math.sqrt(len(gaps))
    return Difference(mean, mean - half, mean + half, len(gaps))


def baselines(groups: Sequence[Group], method: str | None = None) -> list[Group | None]:
    """For each group: the group of the baseline with the same settings; else its only group; else None.

    Raises FedtriError where no run is of the method asked for.
    """
    if method is not None and method not in {group.method for group in groups}:
        raise FedtriError(f"--baseline: no run of {method!r}; there are {', '.join({g.method: 0 for g in groups})}")
    candidates = [g for g in groups if g.method == (method or groups[0].method)]
    found: list[Group | None] = []
    for group in groups:
        agreeing = [c for c in candidates if all(v is None or v == group.point.get(k) for k, v in c.point.items())]
        choice = [group] if group in candidates else agreeing or candidates
        found.append(choice[0] if len(choice) == 1 else None)
    return found


def frame(groups: Sequence[Group], keys: Sequence[str] = ()) -> pd.DataFrame:
    """table.csv: one row per method and grid point. COLUMNS come first, then settings that differ or are in `keys`."""
    rows = []
    for group in groups:
        config = next(iter(group.runs.values())).config
        row = {
            "method": group.method,
            "data": config.get("data"),
            "partition": config.get("partition"),
            "seeds": len(group.runs),
            "accuracy_mean": group.mean("mean"),
            "accuracy_std": group.std("mean"),
            "worst_mean": group.mean("worst"),
            "best_mean": group.mean("best"),
            "bytes_up_per_client_round": group.mean("bytes_up"),
            "bytes_per_client": group.mean("bytes_per_client"),
            "bytes_total": group.mean("bytes_total"),
            "seconds": round(group.mean("seconds"), 3),
        }
        flat = _flat(config)
        rows.append(row | {key: flat.get(key) for key in keys} | dict(group.point))
    more = {key: None for row in rows for key in row if key not in COLUMNS}
    # a setting stays as it was written: 4 where another run has none is not 4.0
    kept = {key: pd.Series([row.get(key) for row in rows], dtype=object) for key in more}
    return pd.DataFrame({column: [row[column] for row in rows] for column in COLUMNS} | kept)


def readable(groups: Sequence[Group], baseline: str | None = None) -> pd.DataFrame:
    """The table for people, with text in every cell; `caption` explains it."""
    against, most = baselines(groups, baseline), dearest(groups)
    heading = f"less {_paper(groups, baseline)}"
    rows = []
    for group, other in zip(groups, against, strict=True):
        half = group.half_interval()
        row = {
            "method": group.label,
            "seeds": str(len(group.runs)),
            "accuracy": share(group.mean("mean")) + (f" ± {share(half)}" if math.isfinite(half) else ""),
            heading: "baseline" if other is group else "–" if other is None else str(paired(group, other)),
        }
        if most is not None and most not in against:
            row[f"less {most.label}"] = "–" if group is most else str(paired(group, most))
        row |= {"worst": share(group.mean("worst")), "bytes a client": amount(group.mean("bytes_per_client"))}
        if most is not None:
            own = group.mean("bytes_per_client")
            times = f"{most.mean('bytes_per_client') / own:,.0f} times" if own > 0 else "–"
            row["fewer"] = "–" if group is most else times
        rows.append(row | {"time": duration(group.mean("seconds"))})
    return pd.DataFrame(rows)


def dearest(groups: Sequence[Group]) -> Group | None:
    """The group whose clients moved the most bytes, if it is at least twice as many as those of another."""
    sizes = [group.mean("bytes_per_client") for group in groups]
    known = _known(sizes)
    return groups[sizes.index(max(known))] if known and max(known) >= 2 * min(known) else None


def own_settings(groups: Sequence[Group]) -> str:
    """In which settings methods differ from the first one, a clause for each that does; empty where none does."""
    flat = {group.paper: _flat(next(iter(group.runs.values())).config) for group in groups}
    (_, base), *others = flat.items()
    points = {key for group in groups for key in group.point}
    said = []
    for paper, own in others:
        keys = sorted(
            key for key in base.keys() | own.keys() if not key.startswith("method_options.") and key not in points
        )
        if differ := [f"{key} = {own.get(key)}" for key in keys if own.get(key) != base.get(key)]:
            said.append(f"{paper} has settings of its own: {', '.join(differ)}.")
    return " ".join(said)


def caption(groups: Sequence[Group], baseline: str | None = None) -> str:
    """What the numbers of `readable` are, and what can be concluded from them."""
    other = _paper(groups, baseline)
    text = (
        "Accuracy on each client's own test examples: mean over clients (± half of its 95 % interval over seeds), and "
        f"the worst client. Less {other}: the difference in percentage points, paired by seed, with its 95 % interval "
        "where there are two seeds or more. Bytes a client: all it sent and received in the whole run, bases and "
        "sketches too."
    )
    if (most := dearest(groups)) is not None:
        text += f" Fewer: how many times less than {most.label}."
    if settings := own_settings(groups):
        text += f" {settings}"
    text += _footing(groups)
    if all(len(group.runs) == 1 for group in groups):
        return f"{text} One seed: there is no interval, and small differences say nothing; add --seeds 0,1,2."
    return f"{text} An interval that holds 0 shows no difference."


def _footing(groups: Sequence[Group]) -> str:
    """On what footing the runs were compared, and how their learning rates were found."""
    about = comparison([run for group in groups for run in group.runs.values()])
    equal, tuning, text = about.get("footing"), about.get("tuning"), ""
    if equal:
        text += f" Compared at equal {equal}" + ("." if equal == "rank" else "; the ranks were set to make it so.")
    if isinstance(tuning, dict):
        tried = ", ".join(f"{factor:g}" for factor in tuning["tried"])
        chosen = ", ".join(f"{place} {factor:g}" for place, factor in tuning["chosen"].items())
        text += (
            f" Learning rates were tuned on validation examples: {tried} times each method's own, "
            f"{tuning['rounds']} rounds each, on one seed; chosen: {chosen}."
        )
    return text or " Learning rates, ranks and targets are as configured, not tuned."


def _paper(groups: Sequence[Group], method: str | None) -> str:
    """What the baseline's paper calls it."""
    return next((group.paper for group in groups if group.method == method), groups[0].paper)


def markdown(table: pd.DataFrame) -> str:
    """A table of text as Markdown."""
    rows = [list(table.columns), ["---"] * len(table.columns), *table.astype(str).to_numpy().tolist()]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |\n" for row in rows)


def _measure(run: Run, measure: str) -> float:
    if measure in ("mean", "worst", "best"):
        scores = run.latest("accuracy")
        reduce = {"mean": lambda x: sum(x) / len(x), "worst": min, "best": max}[measure]
        return float(reduce(list(scores.values()))) if scores else math.nan
    if measure == "bytes_total":
        return run.total_bytes
    if measure == "bytes_per_client":
        return run.total_bytes / len(run.clients) if run.clients else math.nan
    return {
        "bytes_up": lambda: run.per_round("up"),
        "bytes_down": lambda: run.per_round("down"),
        "parameters": lambda: run.parameters_up,
        "seconds": lambda: run.total_seconds,
    }[measure]()


def _known(values: Any) -> list[float]:
    return [value for value in values if math.isfinite(value)]


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            found |= _flat(value, f"{name}.")
        elif name not in NOT_SETTINGS:
            found[name] = value
    return found


def _differs(key: str, methods: Sequence[str], settings: Sequence[Mapping[str, Any]]) -> bool:
    """Whether runs of one method differ in this setting. What only methods differ in belongs to the method."""
    values = [str(own.get(key)) for own in settings]
    return any(len({v for v, m in zip(values, methods, strict=True) if m == method}) > 1 for method in set(methods))
