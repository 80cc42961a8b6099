"""A site's half of a network run: its own model, data and disk, and one answer to one call.

What does not change is kept on disk: the tokenised data with their split, the sketch, and the client's tensors after
each phase of a run. Model and data stay in memory between calls, in worker.py's process.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError

from fedtri.communication import codec
from fedtri.communication.feedback import rounded
from fedtri.communication.flower_calls import Called, SiteError
from fedtri.communication.sealed import Terms
from fedtri.config import Columns, Config, Strict
from fedtri.config.strict import complaint
from fedtri.deploy import examples
from fedtri.deploy.journal import Journal, moment
from fedtri.deploy.terms import common, fingerprint
from fedtri.errors import FedtriError
from fedtri.federation import client
from fedtri.messages import Phase, Reply, Request, Sketch
from fedtri.methods import networked
from fedtri.runs.simulation import choose_method, choose_task, client_ranks, build_executor, fresh, load_model, optimization, start
from fedtri.similarity import sketches
from fedtri.state import Scales
from fedtri.storage.client_store import ClientStore, write_atomic

LOG = logging.getLogger("flwr")


class Node(Strict):
    """A site's own settings: what `flower-supernode --node-config FILE.toml` reads.

    `client` is the name its key is registered under; `state` a folder that only this site can read. The process with
    the model waits `keep_warm` seconds for the next task; 0 has every task load the model anew.
    """

    client: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
    data: str
    state: str
    model: str | None = None
    device: str = "auto"
    columns: Columns = Columns()
    keep_warm: Annotated[float, Field(ge=0)] = 900


@dataclass(frozen=True)
class Opened:
    """A site ready to answer: what client_update needs, but for the client's files, and the site's settings."""

    node: Node
    config: Config
    site: client.Site
    sketch: Path
    """Where its sketch is kept, once it is made."""
    features: int
    """Numbers of the feature that stands for an example in a sketch."""


def node_of(values: Mapping[str, object], where: str = "node config") -> Node:
    """The settings in a table, in which Flower writes `columns.label` for a key in a table. Raises FedtriError."""
    table: dict[str, Any] = {key: value for key, value in values.items() if "." not in key}
    for key, value in values.items():
        if key not in table:
            outer, _, inner = key.partition(".")
            table.setdefault(outer, {})[inner] = value
    try:
        return Node.model_validate(table)
    except ValidationError as error:
        key, what = complaint(Node, error)
    raise FedtriError(f"{where}: {key}: {what}")


def configured(path: Path, run_config: Mapping[str, object], node: Node) -> Config:
    """The federation's configuration with the site's own paths, columns and device in it."""
    config = common(path, run_config)
    columns = config.columns.model_dump() | node.columns.model_dump(exclude_none=True)
    own = {"data": node.data, "device": node.device, "columns": Columns(**columns)}
    return config.model_copy(update=own | ({"model": node.model} if node.model is not None else {}))


def open_site(config: Config, node: Node) -> Opened:
    """Model, data and method of a site. Raises SiteError that names the stage."""
    with stage("reading its configuration"):
        method, recipe = networked(choose_method(config)), choose_task(config)
        ranks = client_ranks(config.rank, sorted(config.network.clients), config.seed)
        if node.client not in ranks:
            raise FedtriError(f"network.clients: {node.client} is not among {', '.join(sorted(ranks))}; add it")
        rank = ranks[node.client]
    with stage("loading its model"):
        adapted, processor, head = load_model(config, tuple(config.network.labels))
        initial = start(config, adapted, head, method.adapter.basis, rank)
    with stage("reading its data"):
        found = examples.load(config, node.client, Path(node.state) / "cache", recipe, processor)
    task, ranked = recipe.learning(config.network.labels, processor), {node.client: rank}
    site = client.Site(
        executor=build_executor(config, adapted, task, found.examples),
        method=method,
        splits={node.client: found.split},
        scales=Scales(config.lora_alpha, ranked),
        optimization=optimization(config),
        initial=lambda _: initial,
        fresh=fresh(config, adapted.layout, ranked),
        store=ClientStore(Path(node.state)),
        seed=config.seed,
        labels=found.examples.labels,
        label_count=task.classes,
        evaluate=config.evaluate,
        validate=config.early_stopping.patience is not None,
    )
    return Opened(node, config, site, found.sketch, task.feature_size(adapted.model))


class Office:
    """A site that answers calls; what one call has opened serves the next until configuration, model or data change."""

    def __init__(self, loading: Callable[[bool], None] = lambda now: None) -> None:
        self._loading = loading
        self._open: tuple[str, Opened] | None = None

    def open(
        self, path: Path, call: Called, node_config: Mapping[str, object], run_config: Mapping[str, object]
    ) -> Opened:
        """The site that this call is for. Raises SiteError that names the stage and nothing of the site's."""
        with stage("reading its configuration"):
            node = node_of(node_config)
            if call.client != node.client:
                raise FedtriError(
                    f"this site is configured as {node.client!r} and registered as {call.client!r}; "
                    "give its node config and `flwr supernode register --name` the same name"
                )
            config = configured(path, run_config, node)
            name = f"{examples.digest(config, node.client)} {node.model_dump_json()} {config.model_dump_json()}"
        if self._open is None or self._open[0] != name:
            self._loading(True)
            try:
                self._open = None  # the old model goes before the new one comes
                self._open = name, open_site(config, node)
            finally:
                self._loading(False)
        return self._open[1]


def respond(opened: Opened, call: Called) -> bytes:
    """The reply's buffer of an open site."""
    site, config, name = opened.site, opened.config, opened.node.client
    terms = Terms(site.executor.layout, config.wire.dtype, config.wire.norm_bound, fingerprint(config), call.run)
    with stage("reading the task"):
        kinds = site.method.plan(0).down | site.method.plan(1).down
        said = terms.decode(call.data, name, site.scales.ranks[name], kinds)
        task = Request(said.phase, said.round, name, said.factors)
        journal = Journal(Path(opened.node.state) / "runs" / call.run.hex())
    LOG.info("fedtri: %s: %s, round %d", name, task.phase, task.round + 1)
    with stage(f"at work on {task.phase}"):
        if task.phase == "sketch":
            return _send(terms, task.phase, _sketched(opened, task))
        when = moment(task.phase, task.round)
        store = journal.before(when)
        (reply,) = client.client_update(replace(site, store=store), [task])
        data = _send(terms, task.phase, rounded(store, reply, config.wire.dtype))
        journal.commit(when, store)
    return data


def _send(terms: Terms, phase: Phase, reply: Reply) -> bytes:
    message = codec.Message(
        phase, reply.round, reply.up, reply.num_examples, reply.metrics,
        b"" if reply.sketch is None else sketches.encode(reply.sketch),
    )  # fmt: skip
    return terms.encode(message, reply.client)


def _sketched(opened: Opened, task: Request) -> Reply:
    """The sketch kept on disk, or a new one, which is kept."""
    site, name = opened.site, opened.node.client
    if opened.sketch.exists():
        found: Sketch | None = sketches.decode(opened.sketch.read_bytes(), classes=site.label_count, d=opened.features)
        return Reply(name, task.round, {}, len(site.splits[name].train), {}, found)
    (reply,) = client.client_update(site, [task])
    assert reply.sketch is not None
    write_atomic(opened.sketch, sketches.encode(reply.sketch))
    return reply


class stage:  # noqa: N801
    """Whatever fails inside is logged here, at the site, and leaves as a SiteError with the stage's name alone."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is None or isinstance(error, SiteError):
            return
        if isinstance(error, FedtriError):
            LOG.error("fedtri: %s: %s", self.name, error)
        elif isinstance(error, Exception):
            LOG.error("fedtri: %s", self.name, exc_info=error)
        else:
            return
        raise SiteError(self.name) from error
