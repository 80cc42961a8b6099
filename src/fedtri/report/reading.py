"""Reads a run directory: what is there, and in words what is missing. Any file in it may be damaged or absent."""

import json
import math
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from safetensors.numpy import load_file

from fedtri.errors import FedtriError
from fedtri.metrics import ONCE, SPREADS, STAGES
from fedtri.storage import run_directory

WAYS = ("up", "down", *ONCE)
EXPECTED = ("loss", "accuracy", "accuracy_local", "bytes", "seconds")

COMPARISON = "compare.json"
"""The file that makes a folder a comparison; it holds the order of its runs."""

Table = Mapping[str, Any]


@dataclass(frozen=True)
class Run:
    """A run, finished or not: its config, its rounds, and its clients' adapters on demand."""

    folder: Path
    config: Table
    summary: Table
    """Empty where the run is not finished."""
    lines: Sequence[Table]
    environment: Table
    about: Table = field(default_factory=dict)
    """The method's name and paper."""
    troubles: tuple[str, ...] = ()
    """What could not be read, a sentence each."""

    @property
    def method(self) -> str:
        """What the method calls itself."""
        return str(self.about.get("name") or self.summary.get("method") or self.config.get("method", "unknown method"))

    @property
    def paper(self) -> str:
        """What the method's paper calls it; else its own name."""
        return str(_table(self.about.get("paper")).get("name") or self.method)

    @property
    def seed(self) -> int:
        """The run's seed."""
        return int(self.config.get("seed", 0))

    @property
    def finished(self) -> bool:
        """Whether the run came to its end."""
        return bool(self.summary)

    @cached_property
    def clients(self) -> list[str]:
        """Every client that is known of, sorted."""
        named = {str(c) for line in self.lines for c in _items(line.get("clients"))}
        return sorted(named | {str(c) for c in self.client_table})

    @property
    def client_table(self) -> dict[str, Table]:
        """Each client's sizes, label counts and guess; empty where the run is not finished."""
        return {str(c): _table(about) for c, about in _table(self.summary.get("client_table")).items()}

    @cached_property
    def labels(self) -> list[str]:
        """The classes' names, by id."""
        return [str(name) for name in _items(self.summary.get("labels"))]

    def by_client(self, metric: str) -> pd.DataFrame:
        """A metric of every client: a row a round, a column a client; NaN where it was not reported."""
        return self._by_client[metric]

    @cached_property
    def _by_client(self) -> dict[str, pd.DataFrame]:
        tables = {}
        for metric in SPREADS:
            rows = {line["round"]: _numbers(_table(line.get(metric)).get("clients")) for line in self.lines}
            frame = pd.DataFrame.from_dict(rows, orient="index", dtype=float)
            tables[metric] = frame.reindex(columns=sorted(frame.columns)).rename_axis("round")
        return tables

    @cached_property
    def rounds(self) -> pd.DataFrame:
        """A row a round: loss; mean, worst and best of each metric; bytes of all clients together; seconds."""
        rows = []
        for line in self.lines:
            row = {
                "round": line["round"],
                "clients": len(_items(line.get("clients"))),
                "loss": number(line.get("loss")),
            }
            for metric in SPREADS:
                found = _table(line.get(metric))
                row |= {
                    metric: number(found.get("mean")),
                    f"{metric}_worst": number(found.get("worst")),
                    f"{metric}_best": number(found.get("best")),
                }
            moved = _table(line.get("bytes"))
            row |= {f"bytes_{way}": float(np.nansum([*_numbers(moved.get(way)).values(), 0.0])) for way in WAYS}
            spent = _table(line.get("seconds"))
            row |= {f"seconds_{phase}": number(spent.get(phase)) for phase in STAGES}
            rows.append(row)
        columns = ["round", "clients", "loss", *(f"{m}{s}" for m in SPREADS for s in ("", "_worst", "_best"))]
        columns += [*(f"bytes_{way}" for way in WAYS), *(f"seconds_{phase}" for phase in STAGES)]
        return pd.DataFrame(rows, columns=columns).set_index("round")

    @cached_property
    def cumulative_bytes(self) -> pd.Series:
        """Bytes that all clients have sent up to and with each round, bases and sketches among them."""
        return pd.Series(self.rounds[["bytes_up", "bytes_basis", "bytes_sketch"]].sum(axis=1).cumsum())

    def latest(self, metric: str) -> dict[str, float]:
        """Each client's last known value of a metric."""
        known = self.by_client(metric).ffill()
        return known.iloc[-1].dropna().to_dict() if len(known) else {}

    def per_round(self, way: str) -> float:
        """Bytes a client that took part sent ("up") or received ("down") in a round, on average; NaN where unknown."""
        counts = []
        for line in self.lines:
            took_part = {str(c) for c in _items(line.get("clients"))}
            moved = _numbers(_table(line.get("bytes")).get(way))
            counts += [n for client, n in moved.items() if way == "up" or client in took_part]
        return float(np.nanmean(counts)) if counts else math.nan

    @property
    def total_bytes(self) -> float:
        """All bytes, both ways and all clients."""
        return float(self.rounds[[f"bytes_{way}" for way in WAYS]].to_numpy().sum())

    @property
    def total_seconds(self) -> float:
        """Seconds of all phases together."""
        return float(np.nansum(self.rounds[[f"seconds_{phase}" for phase in STAGES]].to_numpy(dtype=float)))

    @property
    def parameters_up(self) -> float:
        """How many numbers a client sends a round; NaN where unknown."""
        return number(_table(self.summary.get("bytes")).get("numbers_up_per_client_round"))

    def matrices(self) -> dict[int, tuple[list[str], dict[str, np.ndarray]]]:
        """By round: the clients, and the square matrices between them ("data", "model", "weights")."""
        found = {}
        for line in self.lines:
            entry = _table(line.get("similarity"))
            names = [str(c) for c in _items(entry.get("clients"))]
            square = {key: _square(entry[key], len(names)) for key in ("data", "model", "weights") if key in entry}
            square = {key: value for key, value in square.items() if value is not None}
            if names and square:
                found[line["round"]] = (names, square)
        return found

    def rho(self, which: str) -> pd.DataFrame:
        """ρ ("exact" or "best_rank_r"): a row a round, a column a layer; empty for methods without it."""
        rows = {line["round"]: _numbers(_table(line.get("rho")).get(which)) for line in self.lines}
        return pd.DataFrame.from_dict({r: v for r, v in rows.items() if v}, orient="index", dtype=float)

    def adapter(self, client: str) -> dict[str, np.ndarray]:
        """A client's exported tensors by name. Raises FedtriError where there is no such adapter."""
        path = self.folder / "adapters" / client / "adapter_model.safetensors"
        if not path.is_file():
            known = sorted(p.name for p in (self.folder / "adapters").glob("*"))[:12]
            raise FedtriError(f"{path}: is not there; adapters of this run: {', '.join(known) or 'none yet'}")
        return load_file(path)

    @cached_property
    def missing(self) -> list[str]:
        """All that a reader should know is not there, a sentence each."""
        said = list(self.troubles)
        if not self.finished:
            planned = self.config.get("rounds", "?")
            said.append(
                f"The run is not finished: {len(self.lines)} of {planned} rounds. Continue it with "
                f"`fedtri resume {self.folder}`; label mixes are known only at the end."
            )
        elif not self.client_table:
            said.append("summary.json has no client_table, so clients' sizes and label mixes are not known.")
        elif bare := [client for client, about in self.client_table.items() if about.get("labels", []) == []]:
            said.append(f"summary.json has no label counts of {', '.join(bare[:5])}{' and others' * (len(bare) > 5)}.")
        evaluated = self.config.get("evaluate", True)
        for key in EXPECTED:
            if not evaluated and key.startswith("accuracy"):
                continue
            if absent := [line["round"] for line in self.lines if line.get(key) is None]:
                said.append(f"{key} is missing in {_rounds(absent)}.")
        if not evaluated:
            said.append("The run was made with evaluate = false: accuracy was not measured each round.")
        for key in ("loss", *SPREADS):
            if broken := [line["round"] for line in self.lines if _broken(line.get(key))]:
                said.append(f"{key} is not a finite number in {_rounds(broken)}; those points are left out.")
        if refused := [line["round"] for line in self.lines if line.get("refused")]:
            said.append(f"The server refused replies in {_rounds(refused)}.")
        return said


def load(folder: str | Path) -> Run:
    """The run in this folder. Raises FedtriError where there is no config.toml; anything else may be missing."""
    folder = run_directory.require(Path(folder))
    troubles: list[str] = []
    config = _toml(folder / "config.toml", troubles)
    summary = _json(folder / "summary.json", troubles)
    environment, about = (_json(folder / name, troubles) for name in ("environment.json", "method.json"))
    lines = _lines(folder / "rounds.jsonl", troubles)
    return Run(folder, config, summary, lines, environment, about, tuple(troubles))


def find(folders: Iterable[Path]) -> list[Path]:
    """The run directories among these folders and directly inside them. Raises FedtriError for one without any."""
    found: list[Path] = []
    for folder in folders:
        inside = [folder] if (folder / "config.toml").is_file() else _inside(folder)
        if not inside:
            raise FedtriError(f"{folder}: is no run directory and holds none: expected a config.toml in it")
        found += [path for path in inside if path not in found]
    return found


def comparison(runs: Sequence[Run]) -> Table:
    """What is known of the comparison that these runs are of; empty where they are not of one."""
    folders = {run.folder.parent for run in runs}
    return _json(folders.pop() / COMPARISON, []) if len(folders) == 1 else {}


def _inside(folder: Path) -> list[Path]:
    """The run directories in a folder: in the order of its comparison where it is one, then by name."""
    asked = _items(_json(folder / COMPARISON, []).get("runs"))
    order = {name: place for place, name in enumerate(asked)}
    return sorted((p.parent for p in folder.glob("*/config.toml")), key=lambda p: (order.get(p.name, len(order)), p))


def number(value: object) -> float:
    """A float; NaN for what is no finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return math.nan
    return float(value) if math.isfinite(value) else math.nan


def _lines(path: Path, troubles: list[str]) -> list[Table]:
    try:
        text = path.read_text(errors="replace")
    except OSError:
        troubles.append("rounds.jsonl is missing: no round has finished.")
        return []
    found: dict[int, Table] = {}
    rows = text.splitlines()
    for place, row in enumerate(rows, 1):
        try:
            line = json.loads(row)
        except ValueError:
            where = "the last line" if place == len(rows) else f"line {place}"
            troubles.append(f"rounds.jsonl: {where} is cut short or is not JSON, and is left out.")
            continue
        if isinstance(line, dict) and isinstance(line.get("round"), int):
            found[line["round"]] = line
        else:
            troubles.append(f"rounds.jsonl: line {place} has no round number, and is left out.")
    return [found[r] for r in sorted(found)]


def _json(path: Path, troubles: list[str]) -> Table:
    try:
        return _table(json.loads(path.read_text()))
    except FileNotFoundError:
        if path.name != "summary.json":
            troubles.append(f"{path.name} is missing.")
    except (OSError, ValueError):
        troubles.append(f"{path.name} cannot be read: it is cut short or is not JSON.")
    return {}


def _toml(path: Path, troubles: list[str]) -> Table:
    try:
        return tomllib.loads(path.read_text())
    except (OSError, ValueError):
        troubles.append("config.toml cannot be read: it is not TOML, so the settings are not known.")
        return {}


def _table(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _items(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def _numbers(value: object) -> dict[str, float]:
    return {str(name): number(x) for name, x in _table(value).items()}


def _square(rows: object, size: int) -> np.ndarray | None:
    try:
        matrix = np.array(rows, dtype=float)
    except (TypeError, ValueError):
        return None
    return matrix if matrix.shape == (size, size) else None


def _broken(value: object) -> bool:
    """Whether something that was written down is not finite."""
    if isinstance(value, dict):
        return any(_broken(v) for v in value.values())
    return isinstance(value, float) and not math.isfinite(value)


def _rounds(numbers: Sequence[int]) -> str:
    if len(numbers) == 1:
        return f"round {numbers[0]}"
    spans: list[list[int]] = []
    for n in numbers:
        if spans and n == spans[-1][1] + 1:
            spans[-1][1] = n
        else:
            spans.append([n, n])
    words = [str(a) if a == b else f"{a} to {b}" for a, b in spans]
    return "rounds " + ", ".join(words[:6]) + (" and more" if len(words) > 6 else "")
