"""A run directory: who may write to it, what lies where, and reading it back without loading a model.

config.toml, labels.json, environment.json, rounds.jsonl, summary.json, checkpoints/, clients/ (their own tensors),
adapters/ (PEFT).
"""

import fcntl
import json
import os
import platform
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
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
    "flwr",
    "flwr-datasets",
    "POT",
    "scikit-learn",
    "numpy",
)


@contextmanager
def created(out: str | None, method: str) -> Iterator[Path]:
    """Hold a new run's folder: the one asked for, which must be empty or absent, or the next free runs/METHOD-N.

    A run that fails before its first checkpoint leaves nothing behind, so that its mistake can be corrected and the
    same folder asked for again. An interrupted one stays, for `resume`, once its configuration is written.
    """
    path = _new(out, method)
    with locked(path):
        try:
            yield path
        except KeyboardInterrupt:
            if not _is_run(path):
                _clear(path)
            raise
        except Exception:
            if not any(path.glob("checkpoints/*.json")):
                _clear(path)
            raise


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the folder for writing; the lock goes with the process. Raises FedtriError where another holds it.

    A KeyboardInterrupt inside leaves with how to go on as its message.
    """
    try:
        file = (path / ".lock").open("a")
    except OSError as error:
        raise FedtriError(f"{path}: cannot be written to: {error.strerror}; choose another folder") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise FedtriError(f"{path}: is in use by a running run; wait for it or choose another folder") from None
        try:
            yield
        except KeyboardInterrupt:
            if _is_run(path):
                raise KeyboardInterrupt(f"interrupted; go on from the last round with: fedtri resume {path}") from None
            raise


def _new(out: str | None, method: str) -> Path:
    number = 1
    while True:
        path = Path("runs") / f"{method}-{number}" if out is None else Path(out).expanduser()
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            if out is not None:
                return _empty(path)
            number += 1
        except OSError as error:
            raise FedtriError(f"out: {path} cannot be made: {error.strerror}; choose another folder") from None
        else:
            return path


def _empty(path: Path) -> Path:
    if not path.is_dir():
        raise FedtriError(f"out: {path} is a file, expected a folder that is empty or does not exist; choose another")
    present = {p.name for p in path.iterdir()}
    if ".lock" in present:
        with locked(path):
            pass
    if not present - {".lock"}:
        return path
    if _is_run(path):
        raise FedtriError(f"out: {path} holds a run; continue it with `fedtri resume {path}` or choose another folder")
    raise FedtriError(f"out: {path} is not empty ({min(present)} is there), expected an empty or new folder")


def _clear(path: Path) -> None:
    for entry in path.iterdir():
        if entry.is_dir():
            shutil.rmtree(entry)
        else:
            entry.unlink()
    with suppress(OSError):  # the folder one stands in
        path.rmdir()


def _is_run(path: Path) -> bool:
    return (path / "config.toml").is_file()


def require(path: Path) -> Path:
    """The folder, where it holds a run. Raises FedtriError for any other."""
    if not _is_run(path):
        found = "which is not there" if path.is_dir() else "and there is no such folder"
        raise FedtriError(f"{path}: is not a run directory: expected a config.toml in it, {found}; check the path")
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
        raise FedtriError(f"{path}/summary.json: is not JSON; was it edited?") from None


def read_threads(path: Path) -> int | None:
    """On how many of PyTorch's threads a run began, where it says so."""
    with suppress(OSError, ValueError):
        return json.loads((path / "environment.json").read_text()).get("threads")
    return None


def read_labels(path: Path) -> list[str]:
    """The names of the classes of a run, by id."""
    try:
        return json.loads((path / "labels.json").read_text())
    except (OSError, ValueError) as error:
        raise FedtriError(f"{path}/labels.json: cannot be read: {error}; expected the names of the classes") from None


def read_own_labels(path: Path, client: str) -> list[str] | None:
    """The names of the classes of a client's own head; None where it is everyone's."""
    folder = path / "clients" / client
    return read_labels(folder) if (folder / "labels.json").exists() else None


def write_own_labels(path: Path, client: str, labels: Sequence[str]) -> None:
    """Keep the names of the classes of a client's own head."""
    folder = path / "clients" / client
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "labels.json", list(labels))


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
