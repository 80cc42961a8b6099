"""Flower's simulation engine as transport: every request goes to one of Ray's actors, on any machine or GPU of Ray's.

An actor builds the federation once, with room for one client, from the run directory, which all machines must see.
Clients' own tensors lie there too: a request says which files of its client are current, and so does the reply.
"""

import functools
import json
import os
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from queue import Queue
from typing import Any

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.simulation import run_simulation

from fedtri.communication.in_process import LocalTransport
from fedtri.errors import FedtriError
from fedtri.messages import Answer, Failure, Request
from fedtri.storage.client_store import ClientStore, Saved, owner

RECORD = "r"
POLL = 0.05
"""Seconds between two looks at what has arrived."""
Build = Callable[[Path], LocalTransport]


class SimulatedTransport:
    """The server's end: encodes requests and reads replies; the clients are built by the actors."""

    def __init__(self, local: LocalTransport, grid: Grid, folder: Path, running: Callable[[], bool]) -> None:
        """`local` says what the clients are, `folder` is the run directory, `running` says if the simulation is."""
        self.local, self.grid, self.folder, self.running = local, grid, folder, running

    def clients(self) -> list[str]:
        """The ids of the clients, sorted."""
        return self.local.clients()

    def exchange(self, requests: Sequence[Request]) -> list[Answer | Failure]:
        """Send every request at once; Ray runs as many side by side as it has room for.

        Raises FedtriError where an actor fails.
        """
        nodes, store = self._nodes(), self.local.site.store
        sent = [self.local.codec.write_request(request) for request in requests]
        messages = []
        for number, (request, data) in enumerate(zip(requests, sent, strict=True)):
            files = {name: asdict(store.current[name]) for name in _files(store, request.client)}
            record = {"folder": str(self.folder), "client": request.client, "data": data, "files": json.dumps(files)}
            content = RecordDict({RECORD: ConfigRecord(record)})
            messages.append(Message(content, dst_node_id=nodes[number % len(nodes)], message_type="query"))
        places = {number: place for place, number in enumerate(self.grid.push_messages(messages))}
        answers: dict[int, Answer | Failure] = {}
        while len(answers) < len(requests):
            self._require_running()
            for reply in self.grid.pull_messages([number for number, place in places.items() if place not in answers]):
                place = places[reply.metadata.reply_to_message_id]
                answers[place] = self._answer(requests[place], reply, sent[place])
            time.sleep(POLL)
        return [answers[place] for place in range(len(requests))]

    def _nodes(self) -> list[int]:
        """Flower's nodes, any of which serves any client; they are there a moment after the start."""
        while not (found := sorted(self.grid.get_node_ids())):
            self._require_running()
            time.sleep(POLL)
        return found

    def _require_running(self) -> None:
        if not self.running():
            raise FedtriError("transport: Flower's simulation has ended; what it said stands above")

    def _answer(self, request: Request, reply: Message, down: bytes) -> Answer | Failure:
        client = request.client
        if reply.has_error():
            raise FedtriError(f"{client}: Flower's simulation: {reply.error.reason}; what it said stands above")
        record = reply.content.config_records[RECORD]
        if "failed" in record:
            raise FedtriError(f"{client}: {record['failed']}")
        data, files = record["data"], json.loads(str(record["files"]))
        assert isinstance(data, bytes)
        self.local.site.store.current |= {name: Saved(**saved) for name, saved in files.items()}
        return self.local.read(request, down, data)


@contextmanager
def simulated(
    local: LocalTransport, build: Build, folder: Path, *, cpus: int, gpus: float
) -> Iterator[SimulatedTransport]:
    """A transport through Flower's simulation, which runs as long as this lasts.

    Args:
        build: The federation in a run directory, with room for one client, as an actor sees it.
        cpus: Cores for each client that is at work.
        gpus: Share of a GPU for each.
    """
    grids, over, failures = Queue[Grid | None](), threading.Event(), list[BaseException]()
    server, nodes = ServerApp(), len(local.clients())

    @server.main()
    def _main(grid: Grid, context: Context) -> None:
        grids.put(grid)
        over.wait()

    def simulate() -> None:
        try:
            run_simulation(
                server, client_app(build, cpus), num_supernodes=nodes,
                backend_config={"client_resources": {"num_cpus": cpus, "num_gpus": gpus}},
            )  # fmt: skip
        except BaseException as error:
            failures.append(error)
        finally:
            grids.put(None)

    thread = threading.Thread(target=simulate, daemon=True)
    # Flower shows every DeprecationWarning of the whole process, of all libraries, once its simulation is loaded
    with _importable(), warnings.catch_warnings():
        thread.start()
        if (grid := grids.get()) is None:
            why = failures[0] if failures else "see above"
            raise FedtriError(f"transport: Flower's simulation did not start: {why}")
        try:
            yield SimulatedTransport(local, grid, folder, thread.is_alive)
        finally:
            over.set()
            thread.join()


@contextmanager
def _importable() -> Iterator[None]:
    """While this lasts, Ray's actors can import whatever this process can."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    try:
        yield
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


def client_app(build: Build, cpus: int) -> ClientApp:
    """An actor's app: the client's half of one request."""
    app = ClientApp()
    app.query()(functools.partial(_query, build, cpus))  # Ray takes functions by their names alone
    return app


def _query(build: Build, cpus: int, message: Message, context: Context) -> Message:
    said = _served(build, cpus, message.content.config_records[RECORD])
    return Message(RecordDict({RECORD: ConfigRecord(said)}), reply_to=message)


def _served(build: Build, cpus: int, record: Mapping[str, Any]) -> dict[str, Any]:
    import torch

    torch.set_num_threads(cpus)
    client = record["client"]
    try:
        transport = _built(build, Path(record["folder"]))
        store = transport.site.store
        for name in _files(store, client):
            store.current.pop(name, None)
        store.current |= {name: Saved(**saved) for name, saved in json.loads(record["files"]).items()}
        (data,) = transport.serve([client], [record["data"]])
    except FedtriError as error:
        return {"failed": str(error)}
    files = {name: asdict(store.current[name]) for name in _files(store, client)}
    return {"data": data, "files": json.dumps(files)}


@functools.lru_cache(maxsize=1)
def _built(build: Build, folder: Path) -> LocalTransport:
    return build(folder)


def _files(store: ClientStore, client: str) -> list[str]:
    """The names under which a client's tensors are kept: its own, and those beside it."""
    return [name for name in store.current if owner(name) == client]
