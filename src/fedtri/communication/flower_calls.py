"""What one message of a run holds on Flower's wire, and the two apps that Flower starts; imports no torch.

A site's app is a process a message, so that what it imports is paid by every message.
"""

import logging
import re
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

__all__ = [
    "BEHIND", "BODY", "FAILED", "PREFIX", "STAGE", "Called", "Grid", "SiteError", "called", "client_app", "server_app",
]  # fmt: skip

LOG = logging.getLogger("flwr")
PREFIX = struct.Struct("<8sB")
"""Of a task: the run's number and the length of the client's name, which follows; then the buffer."""
BODY, FAILED = "b", "failed"
BEHIND = "lacking what was sent before"
"""The stage of a site that has lost what the request builds on."""
STAGE = re.compile(r"[A-Za-z ]{1,80}")


@dataclass(frozen=True)
class Called:
    """A task as it arrives at a site: which run, which client, the buffer, and the seconds it may take."""

    run: bytes
    client: str
    data: bytes
    seconds: float


class SiteError(Exception):
    """What a site tells the server of a mistake: the stage, in letters alone; all else stays in the site's log."""


def client_app(answer: Callable[[Called, Mapping[str, object], Mapping[str, object]], bytes]) -> ClientApp:
    """The app of a site; `answer` takes the call, the node's and the run's configuration, and gives the reply's buffer.

    Of an exception the server hears nothing but a stage in letters: its text may quote the site's data.
    """
    app = ClientApp()

    def handle(message: Message, context: Context) -> Message:
        record: dict[str, bytes | str]
        try:
            record = {BODY: answer(called(message), context.node_config, context.run_config)}
        except SiteError as failure:
            record = {FAILED: str(failure)}
        except Exception:
            LOG.exception("fedtri: the site's app failed")
            record = {FAILED: "running its app"}
        return Message(RecordDict({BODY: ConfigRecord(record)}), reply_to=message)  # pyright: ignore[reportArgumentType]

    app.query()(handle)
    app.train()(handle)
    app.evaluate()(handle)
    return app


def called(message: Message) -> Called:
    """The call in a message. Raises SiteError where it holds none."""
    body = (message.content.config_records.get(BODY) or {}).get(BODY)
    if not isinstance(body, bytes) or len(body) < PREFIX.size:
        raise SiteError("reading the task")
    run, length = PREFIX.unpack_from(body)
    name, data = body[PREFIX.size : PREFIX.size + length], body[PREFIX.size + length :]
    return Called(run, name.decode(errors="replace"), data, message.metadata.ttl)


def server_app(lead: Callable[[Grid, Mapping[str, object]], None]) -> ServerApp:
    """The app of the server; `lead` takes the grid and the run's configuration, and runs all rounds."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        lead(grid, context.run_config)

    return app
