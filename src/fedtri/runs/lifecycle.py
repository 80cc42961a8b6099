"""Running a configuration in a run directory, resuming it, and what a finished run leaves behind."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from fedtri import config as configuration
from fedtri.adapters.layout import only
from fedtri.communication.codec import payload_bytes
from fedtri.communication.in_process import LocalTransport
from fedtri.config import Config
from fedtri.errors import FedtriError
from fedtri.federation import loop, server
from fedtri.messages import Phase
from fedtri.models.loading import locate
from fedtri.models.peft import unexportable, write_peft
from fedtri.runs.simulation import Federation, build
from fedtri.state import ServerState
from fedtri.storage import checkpoint, run_directory
from fedtri.storage.client_store import ClientStore


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
    on_step: Callable[[int, int, float], None] = lambda slot, step, loss: None


def run(config: Config, listener: Listener = Listener()) -> Iterator[Progress]:
    """Run a configuration in a new run directory; yields after every round."""
    with run_directory.created(config.out, config.method) as folder:
        config = config.model_copy(update={"out": str(folder)})
        federation = build(config, ClientStore(folder / "clients"))
        run_directory.write_text(folder / "config.toml", configuration.dumps(config))
        threads = torch.get_num_threads()
        device = str(federation.adapted.device)
        run_directory.write_json(folder / "labels.json", federation.label_names)
        for client in federation.site.classes:
            run_directory.write_own_labels(folder, client, federation.own_labels(client) or [])
        run_directory.write_json(folder / "environment.json", run_directory.environment(device, config.seed, threads))
        yield from _rounds(folder, federation, None, [], listener)


def starting(config: Config) -> dict[str, Mapping[str, float]]:
    """Each client's metrics on its own test examples with what it starts from, before any training."""
    with TemporaryDirectory() as folder:
        built = build(config.model_copy(update={"evaluate": True}), ClientStore(Path(folder)))
        clients = built.transport.clients()
        answers = built.transport.exchange(server.requests(built.method, ServerState(), clients, 0, "evaluate"))
        return {answer.reply.client: answer.reply.metrics for answer in answers}


def resume(folder: Path, listener: Listener = Listener()) -> Iterator[Progress]:
    """Go on with an interrupted run from its last whole checkpoint; the result is that of a run never stopped."""
    run_directory.require(folder)
    with run_directory.locked(folder):
        config = configuration.load(folder / "config.toml").model_copy(update={"out": str(folder)})
        found = checkpoint.load(folder / "checkpoints", folder / "clients")
        if found is not None and (folder / "summary.json").exists():
            raise FedtriError(f"{folder}: the run is finished; see {folder / 'summary.json'}")
        store = ClientStore(folder / "clients", found.clients if found else None)
        federation = build(config, store)
        yield from _rounds(folder, federation, found, reopened(folder, found), listener)


def _rounds(
    folder: Path,
    federation: Federation,
    found: checkpoint.Checkpoint | None,
    lines: list[dict[str, Any]],
    listener: Listener,
) -> Iterator[Progress]:
    federation.transport.site = site = replace(federation.site, on_step=listener.on_step)
    with _transport(federation, folder) as transport:
        for progress in loop.run(
            federation.method, transport, federation.expected, federation.schedule,
            state=found.state if found else None, history=lines, on_phase=listener.on_phase,
        ):  # fmt: skip
            yield record(folder, progress, site.store, lines)
    export_all(folder, federation)
    run_directory.write_json(folder / "summary.json", summarise(federation, lines))


@contextmanager
def _transport(federation: Federation, folder: Path) -> Iterator[LocalTransport]:
    """How tasks reach clients: in this process, or through Flower's simulation."""
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
    alone = config.simulation.model_copy(update={"cohort": 1})
    return build(config.model_copy(update={"simulation": alone}), ClientStore(folder / "clients")).transport


def record(folder: Path, progress: loop.Progress, store: ClientStore, lines: list[dict[str, Any]]) -> Progress:
    """Write a round's checkpoint and line, and add the line to `lines`."""
    checkpoint.save(folder / "checkpoints", progress.state, store, progress.line)
    run_directory.append_round(folder, progress.line)
    lines.append(dict(progress.line))
    return Progress(folder, progress.round, progress.line, progress.state)


def reopened(folder: Path, found: checkpoint.Checkpoint | None) -> list[dict[str, Any]]:
    """The lines of a run up to its last whole checkpoint, which rounds.jsonl holds from now on."""
    done = found.state.round if found else 0
    lines = [line for line in run_directory.read_rounds(folder) if line["round"] < done]
    if found is not None:
        lines.append(dict(found.line))
    run_directory.write_rounds(folder, lines)
    return lines


def export_all(folder: Path, federation: Federation) -> None:
    """Every client's adapter in PEFT format under adapters/, where it has one; those already there are left alone."""
    if unexportable(federation.site.executor.layout):
        return
    for client in federation.transport.clients():
        target = folder / "adapters" / client
        if not target.exists():
            export_client(target, federation, client)


def export_client(target: Path, federation: Federation, client: str) -> None:
    """One client's adapter, as kept on its own disk, in PEFT format."""
    site = federation.site
    write_peft(
        target, site.kept(client), federation.adapted, alpha=site.scales.alpha,
        base_model=locate(federation.config.model), task_type=federation.recipe.peft_type,
        labels=federation.own_labels(client),
    )  # fmt: skip


def summarise(federation: Federation, lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """summary.json: the result, what it cost in bytes and seconds, and who the clients are."""
    site = federation.site
    any_client = federation.transport.clients()[0]
    payload = payload_bytes(only(site.initial(any_client), federation.method.plan(0).up), federation.config.wire.dtype)
    return summary(federation.config, lines, payload, federation.describe_clients(), federation.label_names)


def summary(
    config: Config, lines: Sequence[Mapping[str, Any]], payload: int, clients: Mapping[str, Mapping[str, object]],
    labels: Sequence[str],
) -> dict[str, Any]:  # fmt: skip
    """What a run's lines come to; `payload` is the bytes of the numbers alone that a client sends in a round."""
    after, local = latest(lines, "accuracy"), latest(lines, "accuracy_local")
    # a client that joins late is sent its first downlink with its task, so only settled rounds are typical
    ups = [n for line in lines for n in line["bytes"]["up"].values()]
    downs = [n for line in lines for c, n in line["bytes"]["down"].items() if c in line["clients"]]
    sketches = [n for line in lines for n in line["bytes"].get("sketch", {}).values()]
    losses = latest(lines, "test_loss")
    guesses = [float(str(about["guess"])) for about in clients.values() if about.get("guess") is not None]
    return {
        "method": config.method,
        "model": config.model,
        "task": config.task,
        "data": config.data,
        "partition": config.partition,
        "rounds": len(lines),
        "clients": len(clients),
        "accuracy": loop.spread(after),
        "accuracy_local": loop.spread(local),
        "test_loss": loop.spread(losses, higher_is_better=False),
        "metrics": {name: spread for line in lines for name, spread in line.get("metrics", {}).items()},
        "guess": sum(guesses) / len(guesses) if guesses else None,
        "bytes": {
            "up_per_client_round": round(sum(ups) / max(len(ups), 1)),
            "down_per_client_round": round(sum(downs) / max(len(downs), 1)),
            "payload_up_per_client_round": payload,
            "sketch_per_client": round(sum(sketches) / len(sketches)) if sketches else 0,
            "total": sum(ups) + sum(n for line in lines for n in line["bytes"]["down"].values()) + sum(sketches),
        },
        "seconds": {
            "total": round(sum(sum(line["seconds"].values()) for line in lines), 3),
            **{
                phase: round(sum(line["seconds"].get(phase, 0.0) for line in lines), 3)
                for phase in ("sketch", "train", "aggregate", "evaluate")
            },
        },
        "labels": list(labels),
        "client_table": clients,
    }


def latest(lines: Sequence[Mapping[str, Any]], name: str) -> dict[str, float]:
    """Each client's last known value of a metric."""
    found: dict[str, float] = {}
    for line in lines:
        found |= (line.get(name) or {}).get("clients", {})
    return found
