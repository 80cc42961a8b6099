"""Four sites and Flower's grid in one process: every message is Flower's own, what a client answers is by a script."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import tomli_w
from flwr import serverapp
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from fedtri.communication.codec import Codec
from fedtri.communication.flower_calls import BODY, FAILED, Called, SiteError, called
from fedtri.deploy import site
from tiny import LABELS, Lab, save_data

CLIENTS = ["a", "b", "c", "d"]
Record = dict[str, Any]
Script = Callable[[Called, site.Opened, Record], Iterable[Record | Exception]]


def honest(call: Called, opened: site.Opened, record: Record) -> list[Record | Exception]:
    """A client that answers what it should."""
    return [record]


def codec_of(opened: site.Opened, call: Called) -> Codec:
    """How a client's messages of this run become bytes."""
    return opened.spec.codec.for_run(call.run)


@dataclass
class Sites:
    """A folder with a federation's configuration and each site's data and settings."""

    folder: Path
    lab: Lab

    def __post_init__(self) -> None:
        for number, client in enumerate(CLIENTS):
            (self.folder / client).mkdir(parents=True)
            save_data(self.folder / client / "data.csv", 24, seed=number)

    @property
    def configuration(self) -> Path:
        return self.folder / "federation.toml"

    def node(self, client: str) -> dict[str, str | float]:
        own = self.folder / client
        return {
            "client": client, "data": str(own / "data.csv"), "state": str(own / "state"), "device": "cpu",
            "columns.text": "sentence", "columns.label": "topic",
        }  # fmt: skip

    def configure(self, **values: Any) -> Path:
        network = {"clients": CLIENTS, "labels": sorted(LABELS), "minimum": 2, "deadline": 1.0, "patience": 1.0}
        network |= values.pop("network", {})
        values = {"out": str(self.folder / "run"), "rounds": 2, "steps": 1, "evaluate": False} | values
        config = self.lab.config(network=network, clients=None, **values)
        self.configuration.write_text(tomli_w.dumps(config.model_dump(exclude_none=True)))
        return self.configuration


@dataclass
class Grid(serverapp.Grid):
    """Stands for Flower's grid: a message is answered when it is pushed, and the answer is there when it is pulled."""

    sites: Sites
    scripts: dict[str, Script] = field(default_factory=dict)
    offline: set[str] = field(default_factory=set)
    sent: list[bytes] = field(default_factory=list)
    """Every body that has gone either way."""

    def __post_init__(self) -> None:
        TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = 1  # as in Flower's own process
        self._offices = {client: site.Office() for client in CLIENTS}
        self._replies: dict[str, list[Message | Exception]] = {}

    def get_nodes(self) -> list[SimpleNamespace]:
        return [SimpleNamespace(name=c, node_id=i + 1) for i, c in enumerate(CLIENTS) if c not in self.offline]

    def get_node_ids(self) -> list[int]:
        raise NotImplementedError

    create_message = send_and_receive = set_run = run = get_node_ids  # pyright: ignore

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        numbers = []
        for message in messages:
            number = str(len(self._replies))
            message.metadata.__dict__["_message_id"] = number
            self._replies[number] = list(self._answers(message))
            numbers.append(number)
        return numbers

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        (number,) = message_ids
        found, self._replies[number] = self._replies[number], []
        for one in found:
            if isinstance(one, Exception):
                raise one
        return [one for one in found if isinstance(one, Message)]

    def _answers(self, message: Message) -> Iterable[Message | Exception]:
        client = CLIENTS[message.metadata.dst_node_id - 1]
        call = called(message)
        self.sent.append(call.data)
        record: Record
        try:
            opened = self._offices[client].open(self.sites.configuration, call, self.sites.node(client), {})
            record = {BODY: site.respond(opened, call)}
        except SiteError as failure:
            yield Message(RecordDict({BODY: ConfigRecord({FAILED: str(failure)})}), reply_to=message)
            return
        for one in self.scripts.get(client, honest)(call, opened, record):
            if isinstance(one, Exception):
                yield one
            else:
                self.sent += [one[BODY]] if isinstance(one.get(BODY), bytes) else []
                yield Message(RecordDict({BODY: ConfigRecord(one)}), reply_to=message)
