"""The server's half of a network run: the round loop of loop.py in a run directory like any other.

The server has no data and loads no weights: shapes come from the model's configuration. An unfinished run in the run
directory is continued where it has the same configuration: after a crash, `flwr run` is all there is to do.
"""

import json
import logging
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fedtri import atomic
from fedtri import config as configuration
from fedtri.communication.flower import FlowerTransport, Grid
from fedtri.config import Config
from fedtri.deploy.door import Door
from fedtri.deploy.terms import agreed, common
from fedtri.errors import FedtriError
from fedtri.federation import loop
from fedtri.metrics import Phase
from fedtri.runs import lifecycle
from fedtri.runs.spec import Spec
from fedtri.runs.summary import summary
from fedtri.storage import checkpoint, run_directory
from fedtri.storage.client_store import ClientStore

LOG = logging.getLogger("flwr")
LOGGED = "run.log"
CHANGEABLE = {"out", "rounds", "device"}
"""Keys that may be changed before a run is resumed; so may those of [network], but for its labels."""


@dataclass(frozen=True)
class Opened:
    """A run directory held for writing: where it is, its number on the network, and the last checkpoint in it."""

    folder: Path
    run: bytes
    found: checkpoint.Checkpoint | None
    lines: list[dict[str, Any]]


def lead(path: Path, grid: Grid, run_config: Mapping[str, object]) -> None:
    """All rounds of a run, from its configuration file. Raises FedtriError in one line."""
    config = common(path, run_config)
    if config.out is None:
        raise FedtriError(f"{path}: out: expected the run directory, so that a run can be resumed; set it")
    spec = agreed(config)
    with opened(config, spec) as run, logged(run.folder / LOGGED):
        transport = FlowerTransport(grid, spec.codec.for_run(run.run), config.network, Door().turned_away)
        for progress in loop.run(
            spec.method, transport, spec.scales, spec.schedule, state=run.found.state if run.found else None,
            history=run.lines, on_phase=_say,
        ):  # fmt: skip
            lifecycle.record(run.folder, progress, ClientStore(run.folder / "clients"), run.lines)
            accuracy = (progress.line["accuracy"] or {}).get("mean", math.nan)
            LOG.info("fedtri: round %d of %d is closed, accuracy %.3f", progress.round, config.rounds, accuracy)
        _finish(config, spec, run, transport.examples)


@contextmanager
def logged(path: Path) -> Iterator[None]:
    """While this lasts, fedtri's log is written to this file too: Flower shows its own only on request.

    An exception that ends it is the file's last line.
    """
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    handler.addFilter(lambda record: record.getMessage().startswith("fedtri: "))
    LOG.addHandler(handler)
    try:
        yield
    except Exception as error:
        LOG.error("fedtri: the run stopped: %s", error)
        raise
    finally:
        LOG.removeHandler(handler)
        handler.close()


@contextmanager
def opened(config: Config, spec: Spec) -> Iterator[Opened]:
    """The run directory: a new one, or one whose unfinished run has this configuration.

    Raises FedtriError where it holds a finished run, or one of another configuration or version of fedtri.
    """
    assert config.out is not None
    folder = Path(config.out).expanduser()
    if not (folder / "config.toml").exists():
        with run_directory.created(config.out, spec.method.name) as folder:
            number = os.urandom(8)
            atomic.write_json(folder / "network.json", {"run": number.hex()})
            run_directory.begin(
                folder, configuration.dumps(config), method=spec.method.described(), clients=spec.clients,
                labels=spec.labels, device="none", seed=config.seed, threads=torch.get_num_threads(),
            )  # fmt: skip
            yield Opened(folder, number, None, [])
        return
    run_directory.require(folder)
    with run_directory.locked(folder):
        _require_same(folder, config)
        found = checkpoint.load(folder / "checkpoints", folder / "clients")
        if found is not None and (folder / "summary.json").exists():
            raise FedtriError(f"{folder}: the run is finished; give another `out` to start a new one")
        atomic.write_text(folder / "config.toml", configuration.dumps(config))
        number = bytes.fromhex(json.loads((folder / "network.json").read_text())["run"])
        lines = lifecycle.reopened(folder, found)
        LOG.info("fedtri: going on with %s at round %d", folder, len(lines) + 1)
        yield Opened(folder, number, found, lines)


def _require_same(folder: Path, config: Config) -> None:
    before, now = configuration.load(folder / "config.toml").model_dump(), config.model_dump()
    before["network"], now["network"] = ({"labels": table["network"]["labels"]} for table in (before, now))
    for key in before.keys() - CHANGEABLE:
        if before[key] != now[key]:
            raise FedtriError(
                f"{folder}: holds a run with {key} = {before[key]!r}, asked for {now[key]!r}; "
                "give another `out`, or the same configuration to go on with it"
            )


def _say(round: int, phase: Phase, clients: Sequence[str]) -> None:
    LOG.info("fedtri: round %d: %s, %d clients", round + 1, phase, len(clients))


def _finish(config: Config, spec: Spec, run: Opened, examples: Mapping[str, int]) -> None:
    from fedtri.report import page, reading

    clients = {name: {"train": examples.get(name)} for name in spec.clients}
    said = summary(
        config, run.lines, method=spec.method.described(), payload=spec.payload_bytes(spec.clients[0]),
        numbers=spec.payload_numbers(spec.clients[0]),
        clients=clients, labels=spec.labels,
    )  # fmt: skip
    atomic.write_json(run.folder / "summary.json", said)
    page.write([reading.load(run.folder)], run.folder / "report.html")
    LOG.info("fedtri: finished; everything is in %s", run.folder)
