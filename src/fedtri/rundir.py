"""A run directory: who may write to it, what lies where, and reading it back without loading a model.

config.toml, labels.json, environment.json, rounds.jsonl, summary.json, checkpoints/, clients/ (their own tensors),
adapters/ (PEFT).
"""

import fcntl
import json
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

from fedtri.errors import FedtriError

PACKAGES = (
    "fedtri",
    "torch",
    "transformers",
    "peft",
    "datasets",
    "flwr-datasets",
    "POT",
    "scikit-learn",
    "numpy",
)


def create(out: str | None, method: str) -> Path:
    """A new run's folder: the one asked for, which must be empty or absent, or the next free runs/METHOD-N."""
    if out is None:
        number = 1
        while (path := Path("runs") / f"{method}-{number}").exists():
            number += 1
    else:
        path = Path(out)
        if path.exists() and not path.is_dir():
            raise FedtriError(f"out: {out} is a file; expected a folder that is empty or does not exist")
        if path.exists() and (present := [p.name for p in path.iterdir() if p.name != ".lock"]):
            if _busy(path):
                raise FedtriError(f"out: {out} is in use by a running run; choose another folder")
            todo = f"continue it with `fedtri resume {out}`" if "config.toml" in present else "nothing is overwritten"
            raise FedtriError(f"out: {out} is not empty ({min(present)} is there); choose another folder, or {todo}")
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FedtriError(f"out: {path} cannot be made: {error.strerror}") from None
    return path


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the folder for writing; the lock goes with the process. Raises FedtriError where another holds it."""
    with (path / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise FedtriError(f"{path}: is in use by a running run; wait for it or choose another folder") from None
        yield


def _busy(path: Path) -> bool:
    try:
        with locked(path):
            return False
    except FedtriError:
        return True


def require(path: Path) -> Path:
    """The folder, where it holds a run."""
    if not (path / "config.toml").is_file():
        raise FedtriError(f"{path}: is not a run directory: expected a config.toml in it")
    return path


def read_rounds(path: Path) -> list[dict[str, Any]]:
    """The lines of rounds.jsonl; a last line cut short by a crash is left out."""
    lines = []
    try:
        text = (path / "rounds.jsonl").read_text()
    except FileNotFoundError:
        return []
    for line in text.splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            break
    return lines


def write_rounds(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """Replace rounds.jsonl by these lines, atomically."""
    write_text(path / "rounds.jsonl", "".join(json.dumps(line) + "\n" for line in lines))


def append_round(path: Path, line: Mapping[str, Any]) -> None:
    """Add one line to rounds.jsonl."""
    with (path / "rounds.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")


def write_json(path: Path, value: object) -> None:
    """Indented JSON, atomically."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Text, atomically: beside the target, then renamed over it."""
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    part.replace(path)


def read_summary(path: Path) -> dict[str, Any]:
    """summary.json of a finished run. Raises FedtriError for one that has none."""
    require(path)
    try:
        return json.loads((path / "summary.json").read_text())
    except FileNotFoundError:
        raise FedtriError(f"{path}: the run is not finished; continue it with `fedtri resume {path}`") from None
    except ValueError:
        raise FedtriError(f"{path}/summary.json: is not JSON") from None


def read_labels(path: Path) -> list[str]:
    """The names of the classes of a run, by id."""
    return json.loads((path / "labels.json").read_text())


def environment(device: str, seed: int, threads: int) -> dict[str, Any]:
    """Versions, machine, device and seed: what a number needs to be repeated."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": threads,
        "device": device,
        "seed": seed,
        "versions": versions,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")),
        platform.processor(),
    )
