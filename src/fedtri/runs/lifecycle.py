"""The life of a run: begun in a run directory, recorded round by round, resumed, and what it leaves when it ends."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from fedtri import atomic, methods
from fedtri import config as configuration
from fedtri.communication.in_process import LocalTransport
from fedtri.config import Config
from fedtri.errors import FedtriError
from fedtri.execution.executor import OnStep
from fedtri.execution.fast.table import why_not
from fedtri.federation import loop, server
from fedtri.messages import Answer, Transport
from fedtri.metrics import Phase
from fedtri.models.loading import locate
from fedtri.models.peft import unexportable, write_peft
from fedtri.runs.simulation import Federation, build
from fedtri.runs.spec import method_of
from fedtri.runs.summary import summary
from fedtri.state import ServerState
from fedtri.storage import checkpoint, run_directory
from fedtri.storage.client_store import ClientStore

LOG = logging.getLogger("fedtri")


@dataclass(frozen=True)
class Progress:
    """One finished round: the run's folder, the round's number from 1, its line of rounds.jsonl, the server's state."""

    folder: Path
    round: int
    line: Mapping[str, Any]
    state: ServerState


@dataclass(frozen=True)
class Listener:
    """What a caller may hear of while a round runs."""

    on_phase: Callable[[int, Phase, Sequence[str]], None] = lambda round, phase, clients: None
    """(round from 0, phase, the clients that are asked)"""
    on_step: OnStep = lambda client, step, loss: None
    """(client, local step from 1, loss of its minibatch)"""


def run(config: Config, listener: Listener = Listener()) -> Iterator[Progress]:
    """Run a configuration in a new run directory; yields after every round.

    Raises FedtriError in one line, before the first round, for whatever cannot be used.
    """
    with run_directory.created(config.out, method_of(config).name) as folder:
        config = config.model_copy(update={"out": str(folder), "method": methods.absolute(config.method)})
        federation = build(config, ClientStore(folder / "clients"), listener.on_step)
        for client in federation.site.classes:
            run_directory.write_own_labels(folder, client, federation.own_labels(client) or [])
        device = str(federation.opened.adapted.device)
        run_directory.begin(
            folder, configuration.dumps(config), method=federation.method.described(),
            clients=federation.spec.clients, labels=federation.spec.labels,
            device=device, seed=config.seed, threads=torch.get_num_threads(),
        )  # fmt: skip
        yield from _rounds(folder, federation, None, [], listener)


def starting(config: Config) -> dict[str, Mapping[str, float]]:
    """Each client's metrics on its own test examples with what it starts from, before any training."""
    with TemporaryDirectory() as folder:
        built = build(config.model_copy(update={"evaluate": True}), ClientStore(Path(folder)))
        state = ServerState(scales=built.spec.scales)
        asked = server.requests(built.method, state, built.spec.clients, 0, "evaluate")
        answers = [one for one in built.transport.exchange(asked) if isinstance(one, Answer)]
        return {answer.reply.client: answer.reply.metrics for answer in answers}


def resume(folder: Path, listener: Listener = Listener()) -> Iterator[Progress]:
    """Go on with an interrupted run from its last whole checkpoint; the result is that of a run never stopped.

    Raises FedtriError for a folder that holds no run, a finished one, or one of another version of fedtri.
    """
    run_directory.require(folder)
    with run_directory.locked(folder):
        config = configuration.load(folder / "config.toml").model_copy(update={"out": str(folder)})
        found = checkpoint.load(folder / "checkpoints", folder / "clients")
        if found is not None and (folder / "summary.json").exists():
            raise FedtriError(f"{folder}: the run is finished; see {folder / 'summary.json'}")
        store = ClientStore(folder / "clients", found.clients if found else None)
        federation = build(config, store, listener.on_step)
        yield from _rounds(folder, federation, found, reopened(folder, found), listener)


def _rounds(
    folder: Path,
    federation: Federation,
    found: checkpoint.Checkpoint | None,
    lines: list[dict[str, Any]],
    listener: Listener,
) -> Iterator[Progress]:
    spec, site = federation.spec, federation.site
    slower = federation.config.simulation.executor == "auto" and why_not(federation.opened.adapted) is not None
    LOG.log(logging.WARNING if slower else logging.INFO, "%s", site.executor.describe())
    with _transport(federation, folder) as transport:
        for progress in loop.run(
            spec.method, transport, spec.scales, spec.schedule,
            state=found.state if found else None, history=lines, on_phase=listener.on_phase,
        ):  # fmt: skip
            yield record(folder, progress, site.store, lines)
    export_all(folder, federation)
    atomic.write_json(folder / "summary.json", summarise(federation, lines))


@contextmanager
def _transport(federation: Federation, folder: Path) -> Iterator[Transport]:
    """How requests reach clients: in this process, or through Flower's simulation."""
    config = federation.config
    if config.transport == "local":
        yield federation.transport
        return
    if find_spec("flwr") is None or find_spec("ray") is None:
        raise FedtriError(
            "transport: flower-sim needs Flower's simulation, which is not installed: pip install 'fedtri[simulation]'"
        )
    from fedtri.communication.flower_simulation import simulated

    resources = {"cpus": config.simulation.client_cpus, "gpus": config.simulation.client_gpus}
    with simulated(federation.transport, one_client, folder.resolve(), **resources) as transport:
        yield transport


def one_client(folder: Path) -> LocalTransport:
    """The clients of a run directory, one at a time, as an actor of Flower's simulation sees them."""
    config = configuration.load(folder / "config.toml")
    alone = config.simulation.model_copy(update={"group": 1})
    return build(config.model_copy(update={"simulation": alone}), ClientStore(folder / "clients")).transport


def record(folder: Path, progress: loop.Progress, store: ClientStore, lines: list[dict[str, Any]]) -> Progress:
    """Write a round's checkpoint and line, and add the line to `lines`."""
    checkpoint.save(folder / "checkpoints", progress.state, store, progress.line)
    run_directory.append_round(folder, progress.line)
    lines.append(dict(progress.line))
    return Progress(folder, progress.round, progress.line, progress.state)


def reopened(folder: Path, found: checkpoint.Checkpoint | None) -> list[dict[str, Any]]:
    """The lines of a run up to its last whole checkpoint; rounds.jsonl is cut to them."""
    done = found.state.round if found else 0
    lines = [line for line in run_directory.read_rounds(folder) if line["round"] < done]
    if found is not None:
        lines.append(dict(found.line))
    run_directory.write_rounds(folder, lines)
    return lines


def export_all(folder: Path, federation: Federation) -> None:
    """Write every client's adapter in PEFT format under adapters/, where it has one and it is not there yet."""
    if unexportable(federation.spec.layout):
        return
    for client in federation.spec.clients:
        target = folder / "adapters" / client
        if not target.exists():
            export_client(target, federation, client)


def export_client(target: Path, federation: Federation, client: str) -> None:
    """One client's adapter, as kept on its own disk, in PEFT format."""
    site = federation.site
    write_peft(
        target, site.kept(client), federation.opened.adapted, alpha=site.scales.alpha,
        base_model=locate(federation.config.model), task_type=federation.recipe.peft_type,
        labels=federation.own_labels(client),
    )  # fmt: skip


def summarise(federation: Federation, lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """summary.json of a run in this process."""
    spec = federation.spec
    return summary(
        federation.config, lines, method=spec.method.described(), payload=spec.payload_bytes(spec.clients[0]),
        numbers=spec.payload_numbers(spec.clients[0]),
        clients=federation.describe_clients(), labels=spec.labels, executor=federation.site.executor.describe(),
    )  # fmt: skip
