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

from fedtri import atomic
from fedtri.communication.flower_calls import BEHIND, Called, SiteError
from fedtri.communication.memory import BehindError, rounds_used
from fedtri.config import ClientName, Columns, Config, Strict
from fedtri.config.strict import complaint
from fedtri.deploy import examples
from fedtri.deploy.journal import Journal, moment
from fedtri.deploy.terms import agreed, common
from fedtri.errors import FedtriError
from fedtri.federation import client
from fedtri.messages import Reply, Request
from fedtri.methods import networked
from fedtri.metrics import ONCE
from fedtri.runs.opening import Data, Machine, open_model, open_site
from fedtri.runs.spec import Spec, method_of
from fedtri.similarity import sketches
from fedtri.storage.client_store import ClientStore

LOG = logging.getLogger("flwr")


class Node(Strict):
    """A site's own settings: what `flower-supernode --node-config FILE.toml` reads.

    `client` is the name under which its key is registered, `state` a folder that only this site can read. The process
    with the model waits `keep_warm` seconds for the next request; at 0 every request loads the model anew.
    """

    client: ClientName
    data: str
    state: str
    model: str | None = None
    device: str = "auto"
    columns: Columns = Columns()
    keep_warm: Annotated[float, Field(ge=0)] = 900


@dataclass(frozen=True)
class Opened:
    """A site ready to answer, but for its client's files, which differ from run to run."""

    node: Node
    spec: Spec
    site: client.Site
    sketch: Path
    """Where its sketch is kept, once it is made."""


def node_of(values: Mapping[str, object], where: str = "node config") -> Node:
    """A site's settings from Flower's flat table, where a key of [columns] is `columns.KEY`. Raises FedtriError."""
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


def open_node(config: Config, node: Node) -> Opened:
    """Model, data and method of a site. Raises SiteError that names the stage."""
    machine = Machine.of(config)
    with stage("reading its configuration"):
        networked(method_of(config))
        if node.client not in (clients := config.network.clients):
            raise FedtriError(f"network.clients: {node.client} is not among {', '.join(sorted(clients))}; add it")
    with stage("loading its model"):
        spec = agreed(config)
        opened = open_model(spec, machine)
    with stage("reading its data"):
        found = examples.load(config, node.client, Path(node.state) / "cache", spec.recipe, opened.processor)
        data = Data(found.examples, {node.client: found.split})
        site = open_site(spec, machine, opened, data, ClientStore(Path(node.state)))
    LOG.info("fedtri: %s", site.executor.describe())
    return Opened(node, spec, site, found.sketch)


class Office:
    """A site that answers calls. What one call opens serves the next, until configuration, model or data change."""

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
                self._open = name, open_node(config, node)
            finally:
                self._loading(False)
        return self._open[1]


def respond(opened: Opened, call: Called) -> bytes:
    """The reply's buffer of an open site. Raises SiteError that names the stage."""
    name, codec = opened.node.client, opened.spec.codec.for_run(call.run)
    with stage("reading the request"):
        said = codec.open_request(call.data, name)
        journal = Journal(Path(opened.node.state) / "runs" / call.run.hex())
        when = moment(said.phase, said.round)
        store = opened.site.store if said.phase in ONCE else journal.before(when, rounds_used(said.base))
        try:
            request = codec.read_request(said, name, store)
        except BehindError as behind:
            LOG.warning("fedtri: %s", behind)
            raise SiteError(BEHIND) from behind
    LOG.info("fedtri: %s: %s, round %d", name, request.phase, request.round + 1)
    with stage(f"at work on {request.phase}"):
        if request.phase == "basis":  # it changes nothing that the client keeps
            (reply,) = client.client_update(opened.site, [request])
            return codec.write_reply(reply, request, store)
        if request.phase == "sketch":
            return codec.write_reply(_sketched(opened, request), request, store)
        (reply,) = client.client_update(replace(opened.site, store=store), [request])
        data = codec.write_reply(reply, request, store)
        journal.commit(when, store)
    return data


def _sketched(opened: Opened, request: Request) -> Reply:
    """The sketch kept on disk, or a new one, which is kept."""
    site, name, size = opened.site, opened.node.client, opened.spec.sketch
    if opened.sketch.exists():
        found = sketches.decode(opened.sketch.read_bytes(), classes=size.classes, d=size.features)
        return Reply(name, request.round, {}, len(site.splits[name].train), {}, found)
    (reply,) = client.client_update(site, [request])
    assert reply.sketch is not None
    atomic.write_bytes(opened.sketch, sketches.encode(reply.sketch))
    return reply


class stage:  # noqa: N801
    """What fails inside is logged here, at the site; the server hears by a SiteError of the stage's name alone."""

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
