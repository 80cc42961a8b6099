"""The server's half of a network run: the round loop of loop.py in a run directory like any other.

The server has no data and loads no weights: shapes come from the model's configuration. A run directory that holds an
unfinished run of the same configuration is gone on with, so that after a crash `flwr run` is all there is to do.
"""

import json
import logging
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fedtri import config as configuration
from fedtri.adapters.model import install
from fedtri.adapters.layout import Layout
from fedtri.communication.codec import DTYPES
from fedtri.communication.flower import FlowerTransport, Grid
from fedtri.communication.sealed import Sizes, Terms
from fedtri.config import Config
from fedtri.deploy.door import Door
from fedtri.deploy.terms import common, fingerprint
from fedtri.errors import FedtriError
from fedtri.federation import loop
from fedtri.federation.server import Expectation
from fedtri.method import Method
from fedtri.methods import networked
from fedtri.models.loading import find_targets
from fedtri.runs import lifecycle
from fedtri.runs.cost import skeleton
from fedtri.runs.simulation import choose_method, choose_task, client_ranks, largest_rank
from fedtri.state import Scales
from fedtri.storage import checkpoint, run_directory
from fedtri.storage.client_store import ClientStore

LOG = logging.getLogger("flwr")
LOGGED = "run.log"
CHANGEABLE = {"network", "out", "rounds", "device"}
"""Keys that may be changed between the start of a run and its going on."""


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
    method = networked(choose_method(config))
    layout, sizes = shapes(config, method)
    ranks = client_ranks(config.rank, sorted(config.network.clients), config.seed)
    with opened(config) as run, logged(run.folder / LOGGED):
        terms = Terms(layout, config.wire.dtype, config.wire.norm_bound, fingerprint(config), run.run)
        expected = Expectation(layout, Scales(config.lora_alpha, ranks), config.wire.norm_bound)
        transport = FlowerTransport(
            grid, terms, sizes, expected, lambda round: method.plan(round).up, config.network, Door().turned_away
        )
        for progress in loop.run(
            method, transport, expected, _schedule(config), state=run.found.state if run.found else None,
            history=run.lines, on_phase=_say,
        ):  # fmt: skip
            lifecycle.record(run.folder, progress, ClientStore(run.folder / "clients"), run.lines)
            accuracy = (progress.line["accuracy"] or {}).get("mean", math.nan)
            LOG.info("fedtri: round %d of %d is closed, accuracy %.3f", progress.round, config.rounds, accuracy)
        _finish(config, method, run, layout, ranks, transport)


def shapes(config: Config, method: Method) -> tuple[Layout, Sizes]:
    """The layout of every client's tensors and the sizes of a sketch, from the model's configuration alone."""
    recipe, labels = choose_task(config), config.network.labels
    plain = skeleton(config.model, recipe, len(labels) or None)
    task = recipe.learning(labels, None)
    width = task.feature_size(plain) if method.welcome is not None else 0
    adapted = install(
        plain,
        targets=[] if "P" in method.adapter.extra else find_targets(plain, config.targets, config.layers),
        head=recipe.head(plain),
        rank=largest_rank(config.rank),
        kind=config.adapter,
        extra=method.adapter.extra,
        heads=method.adapter.heads,
    )
    return adapted.layout, Sizes(task.classes, width)


@contextmanager
def logged(path: Path) -> Iterator[None]:
    """What happens inside is written to this file too, an error that ends it last: Flower shows it on request alone."""
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
def opened(config: Config) -> Iterator[Opened]:
    """The run directory: a new one, or one whose unfinished run has this configuration.

    Raises FedtriError where it holds a finished run or one of another configuration.
    """
    assert config.out is not None
    folder = Path(config.out).expanduser()
    if not (folder / "config.toml").exists():
        with run_directory.created(config.out, config.method) as folder:
            number = os.urandom(8)
            run_directory.write_json(folder / "network.json", {"run": number.hex(), "clients": config.network.clients})
            run_directory.write_json(folder / "labels.json", config.network.labels)
            environment = run_directory.environment("none", config.seed, torch.get_num_threads())
            run_directory.write_json(folder / "environment.json", environment)
            run_directory.write_text(folder / "config.toml", configuration.dumps(config))
            yield Opened(folder, number, None, [])
        return
    with run_directory.locked(folder):
        _same(folder, config)
        found = checkpoint.load(folder / "checkpoints", folder / "clients")
        if found is not None and (folder / "summary.json").exists():
            raise FedtriError(f"{folder}: the run is finished; give another `out` to start a new one")
        run_directory.write_text(folder / "config.toml", configuration.dumps(config))
        number = bytes.fromhex(json.loads((folder / "network.json").read_text())["run"])
        lines = lifecycle.reopened(folder, found)
        LOG.info("fedtri: going on with %s at round %d", folder, len(lines) + 1)
        yield Opened(folder, number, found, lines)


def _same(folder: Path, config: Config) -> None:
    before, now = configuration.load(folder / "config.toml").model_dump(), config.model_dump()
    before["network"], now["network"] = ({"labels": table["network"]["labels"]} for table in (before, now))
    for key in before.keys() - (CHANGEABLE - {"network"}):
        if before[key] != now[key]:
            raise FedtriError(
                f"{folder}: holds a run with {key} = {before[key]!r}, asked for {now[key]!r}; "
                "give another `out`, or the same configuration to go on with it"
            )


def _schedule(config: Config) -> loop.Schedule:
    return loop.Schedule(
        config.rounds, config.fraction, config.seed, config.evaluate, config.early_stopping.patience,
        quorum=max(1, min(config.network.minimum, round(config.fraction * len(config.network.clients)))),
        attempts=config.network.attempts,
    )  # fmt: skip


def _say(round: int, phase: str, clients: Any) -> None:
    LOG.info("fedtri: round %d: %s, %d clients", round + 1, phase, len(clients))


def _finish(
    config: Config, method: Method, run: Opened, layout: Layout, ranks: Mapping[str, int], transport: FlowerTransport
) -> None:
    from fedtri.report import page, reading

    width = DTYPES[config.wire.dtype][1].itemsize
    numbers = layout.shapes(next(iter(ranks.values())))
    payload = sum(math.prod(numbers[key]) for key in layout.keys(method.plan(0).up)) * width
    clients = {name: {"train": transport.examples.get(name)} for name in sorted(config.network.clients)}
    said = lifecycle.summary(config, run.lines, payload, clients, config.network.labels)
    run_directory.write_json(run.folder / "summary.json", said)
    page.write([reading.load(run.folder)], run.folder / "report.html")
    LOG.info("fedtri: finished; everything is in %s", run.folder)
