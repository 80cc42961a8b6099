"""The process at a site that keeps model and data in memory. Flower starts a new process for every message.

Flower's process passes each call on over a Unix socket, which lies in a folder that only the site's user can open. It
waits no longer than the server does. A worker that trains for longer is killed: what it has saved is whole, and its
answer is of no use. A worker that is still loading its model is left alone, and is ready for the next call.

One call is five messages on one connection, each sent with `send_bytes`. `send` is never used: it pickles.

    worker to caller    READY: only now does the caller send, so a large buffer never waits for a busy worker
    caller to worker    who calls, for which run, with which settings, as JSON
    caller to worker    the call's buffer
    worker to caller    ANSWERED or REFUSED
    worker to caller    the reply's buffer, or the stage that failed

This module imports no torch, because Flower's process imports it with every message.
"""

import fcntl
import json
import logging
import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import TYPE_CHECKING

from fedtri import atomic
from fedtri.communication.flower_calls import Called, SiteError
from fedtri.errors import FedtriError

if TYPE_CHECKING:
    from fedtri.deploy.site import Office

LOG = logging.getLogger("flwr")
ADDRESS, PLACE = "worker.json", "fedtri-"
READY, ANSWERED, REFUSED = b"ready", b"answered", b"refused"
TRIES = 2
"""A worker may end just when a call comes. The call is then given to the next worker."""
WAITING = 16
"""Calls that may wait to be accepted."""


def answer(path: Path, call: Called, node_config: Mapping[str, object], run_config: Mapping[str, object]) -> bytes:
    """The reply's buffer to one call, from the site's worker, which is started where there is none.

    Args:
        path: The federation's configuration, federation.toml.
        call: What the server asks, and the seconds that it waits.
        node_config: The site's own settings; without "state", or with "keep_warm" 0, this process answers by itself.
        run_config: What `flwr run` was given on its command line.

    Raises:
        SiteError: The call fails, its worker dies, or it takes longer than the server waits.
    """
    until = time.monotonic() + call.seconds
    keep, state = node_config.get("keep_warm", 900), node_config.get("state")
    if not isinstance(state, str) or not isinstance(keep, int | float) or keep <= 0:
        from fedtri.deploy.site import Office, respond

        return respond(Office().open(path, call, node_config, run_config), call)
    header = {"path": str(path), "run": call.run.hex(), "client": call.client, "seconds": call.seconds}
    request = json.dumps({**header, "node": dict(node_config), "config": dict(run_config)}).encode()
    dead = None
    for _ in range(TRIES):
        with _worker(Path(state), keep, dead) as (connection, process):
            try:
                return _asked(connection, request, call.data, until)
            except TimeoutError:
                raise SiteError(_late(Path(state), process, call.seconds)) from None
            except (EOFError, ConnectionError):
                LOG.error("fedtri: the worker died")
                dead = process
    raise SiteError("at work because its process died")


def serve(folder: Path, keep: float) -> None:
    """Answer calls one after another until none has come for `keep` seconds.

    Args:
        folder: Where callers look for this worker's address: the site's "state".
        keep: Seconds.
    """
    _clear(folder)
    with (
        tempfile.TemporaryDirectory(prefix=PLACE) as place,
        Listener(f"{place}/calls", family="AF_UNIX", backlog=WAITING) as listener,
    ):

        def loading(now: bool) -> None:
            said = {"socket": f"{place}/calls", "process": os.getpid(), "loading": now}
            atomic.write_json(folder / ADDRESS, said)

        loading(True)
        from fedtri.deploy.site import Office  # the first call waits meanwhile

        office = Office(loading)
        loading(False)
        calls: queue.Queue[Connection] = queue.Queue()
        threading.Thread(target=_accept, args=(listener, calls), daemon=True).start()
        with suppress(queue.Empty):
            while True:
                with calls.get(timeout=keep) as connection, suppress(EOFError, ConnectionError):
                    _reply(office, connection)


def _accept(listener: Listener, calls: "queue.Queue[Connection]") -> None:
    """Queue each connection, because `Listener.accept` itself can wait only without end."""
    with suppress(OSError):  # the listener is closed
        while True:
            calls.put(listener.accept())


def _reply(office: "Office", connection: Connection) -> None:
    """Answer one call, unless its caller has given up by the time that the model is loaded."""
    from fedtri.deploy.site import respond

    connection.send_bytes(READY)
    said = json.loads(connection.recv_bytes())
    call = Called(bytes.fromhex(said["run"]), said["client"], connection.recv_bytes(), said["seconds"])
    try:
        opened = office.open(Path(said["path"]), call, said["node"], said["config"])
        if connection.poll():  # a caller that still waits sends nothing more: this is its end
            return
        kind, data = ANSWERED, respond(opened, call)
    except SiteError as failure:
        kind, data = REFUSED, str(failure).encode()
    connection.send_bytes(kind)
    connection.send_bytes(data)


def _asked(connection: Connection, request: bytes, data: bytes, until: float) -> bytes:
    """The worker's answer.

    Raises:
        SiteError: The worker refuses the call.
        TimeoutError: It is not done at `until`.
        EOFError, ConnectionError: It died.
    """
    _received(connection, until)
    connection.send_bytes(request)
    connection.send_bytes(data)
    kind, reply = _received(connection, until), _received(connection, until)
    if kind == REFUSED:
        raise SiteError(reply.decode())
    return reply


def _received(connection: Connection, until: float) -> bytes:
    if not connection.poll(max(until - time.monotonic(), 0.0)):
        raise TimeoutError
    return connection.recv_bytes()


def _late(folder: Path, process: int, seconds: float) -> str:
    """Stop a worker that is not done in time, unless it is loading; the stage that it is in."""
    if json.loads((folder / ADDRESS).read_text())["loading"]:
        LOG.error("fedtri: the model is not loaded within the %.0f s that the server waits", seconds)
        return "loading its model longer than the deadline"
    LOG.error("fedtri: not done within the %.0f s that the server waits; the worker is stopped", seconds)
    with suppress(ProcessLookupError):
        os.kill(process, signal.SIGKILL)
    return "at work longer than the deadline"


@contextmanager
def _worker(folder: Path, keep: float, dead: int | None) -> Iterator[tuple[Connection, int]]:
    """A connection to the folder's worker, and its process number; not to `dead`, whose socket may still be open."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    with (folder / "worker.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        found = _connected(folder, dead) or _started(folder, keep, dead)
    with found[0]:
        yield found


def _started(folder: Path, keep: float, dead: int | None) -> tuple[Connection, int]:
    process = subprocess.Popen([*COMMAND, str(folder), str(keep)], stdin=subprocess.DEVNULL, start_new_session=True)
    while (found := _connected(folder, dead)) is None:
        if process.poll() is not None:
            raise SiteError("starting its worker process")
        time.sleep(0.02)
    return found


def _connected(folder: Path, dead: int | None) -> tuple[Connection, int] | None:
    try:
        said = json.loads((folder / ADDRESS).read_text())
        return None if said["process"] == dead else (Client(said["socket"], family="AF_UNIX"), said["process"])
    except (OSError, ValueError):
        return None


def _clear(folder: Path) -> None:
    """Remove the socket of a worker that was killed."""
    with suppress(OSError, ValueError):
        place = Path(json.loads((folder / ADDRESS).read_text())["socket"]).parent
        if place.name.startswith(PLACE):
            shutil.rmtree(place)


COMMAND = (sys.executable, "-m", "fedtri.deploy.worker")


def main() -> None:
    """`python -m fedtri.deploy.worker FOLDER SECONDS`: serve, with an error as one line in the log."""
    try:
        serve(Path(sys.argv[1]), float(sys.argv[2]))
    except (FedtriError, OSError) as error:
        LOG.error("fedtri: %s", error)
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
