"""A run directory: who may write to it, what lies where, and how to read it back without loading a model.

environment.json (with the layout's version), clients.json, labels.json, config.toml (written last: a folder with it is
a run), rounds.jsonl, summary.json, checkpoints/, clients/ (their own tensors), adapters/ (PEFT).
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

from fedtri import atomic
from fedtri.errors import FedtriError

LAYOUT = 3
"""The version of what run directories and checkpoints hold. Those of another version are refused."""
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

    A KeyboardInterrupt that passes through says how to go on.
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
    with suppress(OSError):  # it may be the current folder
        path.rmdir()


def _is_run(path: Path) -> bool:
    return (path / "config.toml").is_file()


def require(path: Path) -> Path:
    """The folder, where it holds a run of this layout. Raises FedtriError for any other."""
    if not _is_run(path):
        found = "which is not there" if path.is_dir() else "and there is no such folder"
        raise FedtriError(f"{path}: is not a run directory: expected a config.toml in it, {found}; check the path")
    environment = read_environment(path)  # where it is lost, the layout is not known, and what can be read is read
    if environment and (layout := environment.get("layout", 1)) != LAYOUT:
        raise FedtriError(
            f"{path}: the run directory has layout {layout}, expected {LAYOUT}: another version of fedtri wrote it; "
            "read it with that version, or start the run anew"
        )
    return path


def begin(
    path: Path,
    config: str,
    *,
    method: Mapping[str, Any],
    clients: Sequence[str],
    labels: Sequence[str],
    device: str,
    seed: int,
    threads: int,
) -> None:
    """Write what a new run directory holds before its first round.

    Args:
        path: The folder.
        config: The configuration, as TOML.
        method: The method's name and paper, as `Method.described` gives them.
        clients: The clients' names.
        labels: The names of the classes in the order of their ids.
        device: What the run computes on.
        seed: The run's seed.
        threads: How many threads a tensor operation has.
    """
    atomic.write_json(path / "environment.json", environment(device, seed, threads))
    atomic.write_json(path / "method.json", method)
    atomic.write_json(path / "clients.json", list(clients))
    atomic.write_json(path / "labels.json", list(labels))
    atomic.write_text(path / "config.toml", config)


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
    atomic.write_text(path / "rounds.jsonl", "".join(json.dumps(line) + "\n" for line in lines))


def append_round(path: Path, line: Mapping[str, Any]) -> None:
    """Add one line to rounds.jsonl."""
    with (path / "rounds.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")


def read_summary(path: Path) -> dict[str, Any]:
    """summary.json of a finished run. Raises FedtriError for one that has none."""
    require(path)
    try:
        return json.loads((path / "summary.json").read_text())
    except FileNotFoundError:
        raise FedtriError(f"{path}: the run is not finished; continue it with `fedtri resume {path}`") from None
    except ValueError:
        raise FedtriError(f"{path}/summary.json: is not JSON; was it edited?") from None


def read_environment(path: Path) -> dict[str, Any]:
    """What environment.json says; nothing where it cannot be read."""
    try:
        found = json.loads((path / "environment.json").read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def read_clients(path: Path) -> list[str]:
    """The names of a run's clients, sorted."""
    return _read_names(path / "clients.json", "clients")


def read_labels(path: Path) -> list[str]:
    """The names of the classes of a run, by id."""
    return _read_names(path / "labels.json", "classes")


def _read_names(path: Path, what: str) -> list[str]:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise FedtriError(f"{path}: cannot be read: {error}; expected the names of the {what}") from None


def read_own_labels(path: Path, client: str) -> list[str] | None:
    """The names of the classes of a client's own head; None where it is everyone's."""
    folder = path / "clients" / client
    return read_labels(folder) if (folder / "labels.json").exists() else None


def write_own_labels(path: Path, client: str, labels: Sequence[str]) -> None:
    """Keep the names of the classes of a client's own head."""
    atomic.write_json(path / "clients" / client / "labels.json", list(labels))


def environment(device: str, seed: int, threads: int) -> dict[str, Any]:
    """Layout, versions, machine, device and seed: what is needed to repeat a number."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "layout": LAYOUT,
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
