"""The process at a site that keeps model and data in memory while Flower starts a new process for every message.

Flower's process hands the call over by a Unix socket that the site's user alone can reach, and waits no longer than
the server does: a worker that trains for longer is killed, since what it has saved is whole and its answer is of no
use; one that still loads its model is left to it, for the next call.
Imports no torch, for Flower's process imports it with every message; the worker imports what it needs itself.
"""

import base64
import fcntl
import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from fedtri.communication.flower_calls import Called, SiteError
from fedtri.errors import FedtriError

if TYPE_CHECKING:
    from fedtri.deploy.site import Office

LOG = logging.getLogger("flwr")
ADDRESS, PLACE = "worker.json", "fedtri-"
BEGUN, ANSWERED, REFUSED = b"b", b"a", b"r"
TRIES = 2
"""A worker may go just when a call comes; the next one is started for it."""


def answer(path: Path, call: Called, node_config: Mapping[str, object], run_config: Mapping[str, object]) -> bytes:
    """The reply's buffer to one call, by the site's worker, which is started where there is none.

    Raises SiteError where it fails, dies, or is not done in the time that the call leaves.
    """
    until = time.monotonic() + call.seconds
    keep, state = node_config.get("keep_warm", 900), node_config.get("state")
    if not isinstance(state, str) or not isinstance(keep, int | float) or keep <= 0:
        from fedtri.deploy.site import Office, respond

        return respond(Office().open(path, call, node_config, run_config), call)
    request = json.dumps({
        "path": str(path), "run": call.run.hex(), "client": call.client, "seconds": call.seconds,
        "data": base64.b64encode(call.data).decode(), "node": dict(node_config), "config": dict(run_config),
    }).encode()  # fmt: skip
    for _ in range(TRIES):
        with _worker(Path(state), keep) as (connection, process):
            try:
                reply = _asked(connection, request, until).removeprefix(BEGUN)
            except TimeoutError:
                raise SiteError(_late(Path(state), process, call.seconds)) from None
        if reply[:1] == ANSWERED:
            return reply[1:]
        if reply[:1] == REFUSED:
            raise SiteError(reply[1:].decode())
        LOG.error("fedtri: the worker died")
    raise SiteError("at work because its process died")


def _late(folder: Path, process: int, seconds: float) -> str:
    """Stop a worker that is not done in time, unless it is loading; the stage it is in."""
    if json.loads((folder / ADDRESS).read_text())["loading"]:
        LOG.error("fedtri: the model is not loaded within the %.0f s that the server waits", seconds)
        return "loading its model longer than the deadline"
    LOG.error("fedtri: not done within the %.0f s that the server waits; the worker is stopped", seconds)
    os.kill(process, signal.SIGKILL)
    return "at work longer than the deadline"


def serve(folder: Path, keep: float) -> None:
    """Answer calls one after another until none has come for `keep` seconds."""
    _clear(folder)
    with tempfile.TemporaryDirectory(prefix=PLACE) as place, _listening(Path(place) / "calls") as listener:

        def loading(now: bool) -> None:
            _write(folder / ADDRESS, {"socket": f"{place}/calls", "process": os.getpid(), "loading": now})

        loading(True)
        from fedtri.deploy.site import Office  # while the first call waits

        office = Office(loading)
        loading(False)
        listener.settimeout(keep)
        with suppress(TimeoutError):
            while True:
                connection, _ = listener.accept()
                with connection, suppress(ConnectionError):
                    _reply(office, connection)


def _reply(office: "Office", connection: socket.socket) -> None:
    """Answer one call, unless whoever called has gone by the time that the model is loaded."""
    from fedtri.deploy.site import respond

    said = json.loads(_read(connection))
    call = Called(bytes.fromhex(said["run"]), said["client"], base64.b64decode(said["data"]), said["seconds"])
    try:
        opened = office.open(Path(said["path"]), call, said["node"], said["config"])
        connection.sendall(BEGUN)
        connection.sendall(ANSWERED + respond(opened, call))
    except SiteError as failure:
        connection.sendall(REFUSED + str(failure).encode())


def _clear(folder: Path) -> None:
    """Remove the socket of a worker that was killed."""
    with suppress(OSError, ValueError):
        place = Path(json.loads((folder / ADDRESS).read_text())["socket"]).parent
        if place.name.startswith(PLACE):
            shutil.rmtree(place)


def _asked(connection: socket.socket, request: bytes, until: float) -> bytes:
    """The worker's reply, empty where it died. Raises TimeoutError at `until`."""
    try:
        connection.settimeout(max(until - time.monotonic(), 0.1))
        connection.sendall(request)
        connection.shutdown(socket.SHUT_WR)
        return _read(connection, until)
    except ConnectionError:
        return b""


def _read(connection: socket.socket, until: float | None = None) -> bytes:
    """All that the other end sends until it has no more to say."""
    parts = []
    while True:
        if until is not None:
            connection.settimeout(max(until - time.monotonic(), 0.1))
        if not (part := connection.recv(1 << 20)):
            return b"".join(parts)
        parts.append(part)


@contextmanager
def _worker(folder: Path, keep: float) -> Iterator[tuple[socket.socket, int]]:
    """A connection to the folder's worker, and its process' number."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    with (folder / "worker.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        found = _connected(folder) or _started(folder, keep)
    with found[0]:
        yield found


def _started(folder: Path, keep: float) -> tuple[socket.socket, int]:
    command = [sys.executable, "-m", "fedtri.deploy.worker", str(folder), str(keep)]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
    while (found := _connected(folder)) is None:
        if process.poll() is not None:
            raise SiteError("starting its worker process")
        time.sleep(0.02)
    return found


def _connected(folder: Path) -> tuple[socket.socket, int] | None:
    try:
        said = json.loads((folder / ADDRESS).read_text())
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(said["socket"])
    except (OSError, ValueError):
        return None
    return connection, said["process"]


def _listening(path: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()
    return listener


def _write(path: Path, value: object) -> None:
    part = path.with_name(f"{path.name}.part")
    part.write_text(json.dumps(value))
    part.replace(path)


def main() -> None:
    """`python -m fedtri.deploy.worker FOLDER SECONDS`."""
    try:
        serve(Path(sys.argv[1]), float(sys.argv[2]))
    except (FedtriError, OSError) as error:
        LOG.error("fedtri: %s", error)
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
