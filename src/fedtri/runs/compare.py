"""Methods × grid × seeds on one federation, a run directory each; finished runs are kept, interrupted ones resumed.

Partition, initial A, sketches and batches are functions of the configuration and the seed, so methods share them. One
head policy holds for all: where the configuration leaves it to each method ("default"), the head stays personal.
"""

import inspect
import itertools
import json
import shutil
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fedtri import atomic, methods
from fedtri import config as configuration
from fedtri.config import Config
from fedtri.errors import FedtriError
from fedtri.metrics import VALIDATION_LOSS
from fedtri.report import page, reading, tables
from fedtri.report.reading import COMPARISON, Run
from fedtri.runs import footing as footings
from fedtri.runs import lifecycle
from fedtri.storage import run_directory

TUNING = "tuning"
"""The folder, in a comparison's, of the runs that try learning rates."""
QUIET = lifecycle.Listener()


@dataclass(frozen=True)
class Member:
    """One run of a comparison: the name of its folder, its configuration without `out`, and its name but the seed."""

    name: str
    config: Config
    place: str


@dataclass(frozen=True)
class Plan:
    """A comparison: its folder, its runs in order, the grid's keys, and the method to compare others with."""

    folder: Path
    members: tuple[Member, ...]
    keys: tuple[str, ...]
    baseline: str
    footing: footings.Footing | None = None
    """What is equal for all methods, where that was asked for."""
    tuned_for: int | None = None
    """The rounds of each run that tries a learning rate; None: learning rates are as configured."""


@dataclass(frozen=True)
class Step:
    """A run of a comparison begins (`line` is None), a round of it is over, or it was finished before (`kept`)."""

    number: int
    of: int
    member: Member
    folder: Path
    line: Mapping[str, Any] | None = None
    kept: bool = False


def plan(
    config: Path | None,
    names: Sequence[str],
    *,
    seeds: Sequence[int] | None = None,
    grid: Mapping[str, Sequence[Any]] | None = None,
    out: Path | None = None,
    settings: Sequence[str] = (),
    baseline: str | None = None,
    footing: str | None = None,
    tune: bool = False,
    tune_rounds: int | None = None,
) -> Plan:
    """All runs of a comparison, each configuration checked before anything runs.

    Args:
        config: The file; None: the defaults.
        names: The methods.
        seeds: The seeds; by default the configuration's.
        grid: Values of any key to try.
        out: The comparison's folder.
        settings: As of --set.
        baseline: The method that others are compared with; by default the first.
        footing: "rank", "parameters" or "bytes" are to be equal; None: all is as configured.
        tune: Whether each method's learning rates are chosen on validation examples first.
        tune_rounds: The rounds of each run that tries one; by default half of the comparison's.

    A [method_options] key, given in the file, by `settings` or in the grid, goes to the methods that have it.

    Raises:
        FedtriError: Naming the key, what was expected and what was found.
    """
    if not names:
        raise FedtriError("--methods: expected at least one method, separated by commas")
    if baseline is not None and baseline not in names:
        raise FedtriError(f"--baseline: expected one of the compared methods ({', '.join(names)}), got {baseline!r}")
    clean = _clean_names(names)
    for name in configuration.read(config).get("methods", {}) if config else ():
        methods.find(name if name not in clean.values() else next(one for one in names if clean[one] == name))
    grid = dict(grid or {})
    members: dict[str, Member] = {}
    for values in itertools.product(*grid.values()):
        for name, seed in itertools.product(names, seeds or [None]):
            point = dict(zip(grid, values, strict=True))
            member = _member(config, name, clean[name], seed, point, settings)
            members.setdefault(member.name, member)
    specs, found, even = footings.Specs(), list(members.values()), None if footing is None else footings.read(footing)
    if even is not None:
        first = next(m for m in found if m.config.method == methods.absolute(baseline or names[0]))
        sized = footings.equal([m.config for m in found], first.config, even, specs)
        found = [replace(member, config=own) for member, own in zip(found, sized, strict=True)]
    rounds = (tune_rounds or max(1, found[0].config.rounds // 2)) if tune else None
    for member in found:
        try:
            specs.of(member.config if rounds is None else footings.trial(member.config, 1.0, rounds))
        except FedtriError as error:
            raise FedtriError(f"{member.name}: {error}") from None
    folder = out or Path("runs") / f"compare-{config.stem if config else 'defaults'}"
    return Plan(folder, tuple(found), tuple(grid), clean[baseline or names[0]], even, rounds)


def parse_grid(text: str) -> tuple[str, list[Any]]:
    """The key and the values of `key=v1,v2`. A value that is not TOML is a string."""
    key, equals, values = text.partition("=")
    if not equals or not all(part.strip() for part in (key, *values.split(","))):
        raise FedtriError(f"--grid {text!r}: expected key=value,value,…")
    return key.strip(), [configuration.parse_setting(f"{key}={value}")[1] for value in values.split(",")]


def run(comparison: Plan, listener: lifecycle.Listener = QUIET) -> Iterator[Step]:
    """Run what is missing, then write table.csv, table.md and report.html over all finished runs of the folder.

    Raises FedtriError where another process works on the folder, or it holds something else.
    """
    folder = _claim(comparison.folder)
    with run_directory.locked(folder):
        factors: dict[str, float] = {}
        if comparison.tuned_for is not None:
            factors = yield from _tuned(comparison, folder / TUNING, listener)
        members = [
            replace(m, config=footings.at_rate(m.config, factors[m.place])) if m.place in factors else m
            for m in comparison.members
        ]
        tuning = {"rounds": comparison.tuned_for, "tried": footings.FACTORS, "chosen": factors}
        about = {
            "baseline": comparison.baseline, "grid": comparison.keys, "runs": [m.name for m in members],
            "footing": comparison.footing,
            "tuning": tuning if factors else None,
        }  # fmt: skip
        atomic.write_json(folder / COMPARISON, about)
        for number, member in enumerate(members, 1):
            yield from _followed(Step(number, len(members), member, folder / member.name), listener)
        write(comparison)


def _tuned(comparison: Plan, folder: Path, listener: lifecycle.Listener) -> Generator[Step, None, dict[str, float]]:
    """The factor on the learning rates that suits each method and grid point best, on the first seed."""
    assert comparison.tuned_for is not None
    first = {member.place: member for member in reversed(comparison.members)}
    trials = [(place, factor) for place in reversed(first) for factor in footings.FACTORS]
    losses: dict[str, dict[float, float]] = {}
    for number, (place, factor) in enumerate(trials, 1):
        config = footings.trial(first[place].config, factor, comparison.tuned_for)
        member = Member(f"{place}-rate-x{factor:g}", config, place)
        yield from _followed(Step(number, len(trials), member, folder / member.name), listener)
        lines = reading.load(folder / member.name).lines
        losses.setdefault(place, {})[factor] = reading.number(lines[-1].get(VALIDATION_LOSS))
    return {place: footings.best(own) for place, own in losses.items()}


def _followed(step: Step, listener: lifecycle.Listener) -> Iterator[Step]:
    """Run a member, or what is left of it, round by round."""
    own, member = step.folder, step.member
    if _state(own, member) == "finished":
        yield replace(step, kept=True)
        return
    yield step
    begun = (own / "config.toml").exists()
    asked = member.config.model_copy(update={"out": str(own)})
    for progress in lifecycle.resume(own, listener) if begun else lifecycle.run(asked, listener):
        yield replace(step, line=progress.line)


def finished(folder: Path) -> list[Run]:
    """The finished runs in a comparison's folder, in the order they were asked for."""
    return [run for run in map(reading.load, reading.find([folder])) if run.finished]


def write(comparison: Plan) -> None:
    """Write table.csv, table.md and report.html from the finished runs in the comparison's folder."""
    folder, baseline, found = comparison.folder, comparison.baseline, finished(comparison.folder)
    groups = tables.grouped(found)
    text = tables.markdown(tables.readable(groups, baseline)) + f"\n{tables.caption(groups, baseline)}\n"
    atomic.write_text(folder / "table.csv", tables.frame(groups, comparison.keys).to_csv(index=False))
    atomic.write_text(folder / "table.md", text)
    page.write(found, folder / "report.html", baseline)


def _member(
    config: Path | None, method: str, name: str, seed: int | None, point: Mapping[str, Any], settings: Sequence[str]
) -> Member:
    known = {f"method_options.{option}" for option in inspect.signature(methods.find(method)).parameters}
    mine = {key: value for key, value in point.items() if not key.startswith("method_options.") or key in known}
    more = [f"{key}={_toml(value)}" for key, value in mine.items()]
    loaded = configuration.load(config, [*settings, *more, f"method={_toml(methods.absolute(method))}"])
    options = {key: value for key, value in loaded.method_options.items() if f"method_options.{key}" in known}
    loaded = loaded.model_copy(
        update={
            "out": None,
            "method_options": options,
            "seed": loaded.seed if seed is None else seed,
            "head": "personal" if loaded.head == "default" else loaded.head,
        }
    )
    methods.build(method, options, head=loaded.head)
    at = "".join(f"-{key.rpartition('.')[2]}={_plain(value)}" for key, value in mine.items())
    return Member(f"{name}{at}-seed{loaded.seed}", loaded, f"{name}{at}")


def _clean_names(given: Sequence[str]) -> dict[str, str]:
    """What each method that was asked for calls itself. Raises FedtriError where two call themselves the same."""
    found: dict[str, str] = {}
    for name in given:
        clean = methods.build(name).name
        if (other := next((one for one, known in found.items() if known == clean and one != name), None)) is not None:
            raise FedtriError(f"--methods: {other} and {name} both call themselves {clean!r}; rename one of them")
        found[name] = clean
    return found


def _claim(folder: Path) -> Path:
    """The comparison's folder, made where it is absent."""
    if folder.exists() and not folder.is_dir():
        raise FedtriError(f"--out: {folder} is a file; expected a folder")
    present = {p.name for p in folder.iterdir()} - {".lock", TUNING} if folder.exists() else set()
    if present and COMPARISON not in present:
        raise FedtriError(f"--out: {folder} is not empty and holds no comparison ({min(present)} is there)")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FedtriError(f"--out: {folder} cannot be made: {error.strerror}") from None
    return folder


def _state(folder: Path, member: Member) -> str:
    """ "finished", "begun" or "absent". Raises FedtriError where the folder holds a run of other settings."""
    if not (folder / "config.toml").exists():
        if folder.exists():  # killed while it was being set up: nothing in it is of use
            with run_directory.locked(folder):
                shutil.rmtree(folder)
        return "absent"
    held = configuration.load(run_directory.require(folder) / "config.toml")
    found, asked = (config.model_dump(exclude={"out"}) for config in (held, member.config))
    if changed := [key for key in asked if found.get(key) != asked[key]]:
        key = changed[0]
        raise FedtriError(
            f"{folder}: holds a run with {key} = {found.get(key)!r}, asked for is {asked[key]!r}; choose another --out"
        )
    return "finished" if (folder / "summary.json").exists() else "begun"


def _toml(value: object) -> str:
    return json.dumps(value)


def _plain(value: object) -> str:
    return "".join(c if c.isalnum() or c in "._+-" else "_" for c in str(value))
