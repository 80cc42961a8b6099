"""Laws of `fedtri deploy check`: what is in order says ok, what is not says what to do, and the exit code is 2."""

import shutil
import socket
import ssl
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from deploy.grid import Sites
from fedtri.cli.main import main
from fedtri.deploy import certificates
from fedtri.deploy import folder as deployment
from tiny import LABELS, Lab, save_data

ORDER = ["settings", "key", "server", "model", "data"]


@dataclass
class Place:
    """A site's folder and a server that shakes hands."""

    folder: Path
    port: int

    @property
    def federation(self) -> Path:
        return self.folder / "federation.toml"

    def check(self, capsys, monkeypatch, server: str = "") -> tuple[int, dict[str, tuple[bool, str]]]:
        """The exit code, and of each thing looked at whether it is in order and what was said."""
        server = server or f"localhost:{self.port}"
        monkeypatch.chdir(self.folder)
        arguments = ["fedtri", "deploy", "check", ".", "--federation", "federation.toml", "--server", server]
        monkeypatch.setattr(sys, "argv", arguments)
        try:
            main()
            code = 0
        except SystemExit as done:
            code = int(done.code or 0)
        said = [line.split(maxsplit=2) for line in capsys.readouterr().out.splitlines()]
        return code, {what: (mark == "ok", text) for mark, what, text in said}


@pytest.fixture(scope="module")
def made(lab: Lab, tmp_path_factory) -> Iterator[Place]:
    """What `deploy init` writes, a configuration for it, and a TLS server with its certificate."""
    place = tmp_path_factory.mktemp("check")
    server, one, _ = deployment.write(
        place / "fed", clients=["a", "b", "c", "d"][:2], labels=sorted(LABELS), host="localhost", port=1
    )
    sites = Sites(place / "sites", lab)
    sites.configure(method="ce_lora", network={"clients": ["a", "b"]})
    shutil.copy(sites.configuration, one / "federation.toml")
    save_data(one / "data.csv", 30)
    with (one / "node.toml").open("a") as node:
        node.write('\n[columns]\ntext = "sentence"\nlabel = "topic"\n')
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(server / "server.pem", server / "server.key")
    with socket.create_server(("", 0)) as listener:
        threading.Thread(target=_shake_hands, args=(listener, context), daemon=True).start()
        yield Place(one, listener.getsockname()[1])


def _shake_hands(listener: socket.socket, context: ssl.SSLContext) -> None:
    while True:
        try:
            connection, _ = listener.accept()
        except OSError:
            return
        try:
            with context.wrap_socket(connection, server_side=True) as secured:
                secured.recv(1)
        except OSError:
            connection.close()


@pytest.fixture
def place(made, tmp_path) -> Place:
    """A copy that a test may spoil."""
    return Place(shutil.copytree(made.folder, tmp_path / "a"), made.port)


def test_a_site_in_order_says_so(made, capsys, monkeypatch):
    code, said = made.check(capsys, monkeypatch)
    assert said.keys() == set(ORDER), said
    assert all(ok for ok, _ in said.values()), said
    assert code == 0
    assert "ce_lora over 2 sites" in said["settings"][1]
    assert "its certificate is good for 36" in said["server"][1]
    assert "animals 10, plants 10, stones 10" in said["data"][1]


def other_authority(place: Place) -> None:
    (place.folder / "ca.crt").write_bytes(certificates.authority().certificate)


def replaced(file: str, old: str, new: str):
    def spoil(place: Place) -> None:
        path = place.folder / file
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new))

    return spoil


def open_state(place: Place) -> None:
    (place.folder / "state").mkdir(mode=0o755, exist_ok=True)
    (place.folder / "state").chmod(0o755)


SPOILT = {
    "no data": (lambda p: (p.folder / "data.csv").unlink(), "data", "data.csv"),
    "a class nobody knows": (replaced("data.csv", ",plants", ",weeds"), "data", "expected one of"),
    "another column": (replaced("node.toml", '"topic"', '"subject"'), "data", 'no column "subject"'),
    "no model": (replaced("node.toml", "# model =", "model ="), "model", "/models/minilm"),
    "a stranger's name": (replaced("node.toml", 'client = "a"', 'client = "z"'), "settings", "is not among"),
    "an unknown key": (replaced("node.toml", "device", "devise"), "settings", "unknown key; did you mean device?"),
    "state that others read": (open_state, "settings", "chmod 700"),
    "a key that others read": (lambda p: (p.folder / "key").chmod(0o644), "key", "chmod 600"),
    "no key": (lambda p: (p.folder / "key").unlink(), "key", "cannot be read"),
    "another public key": (lambda p: (p.folder / "key.pub").write_bytes(certificates.pair()[1]), "key", "public half"),
    "another authority": (other_authority, "server", "its certificate is not trusted"),
    "no authority": (lambda p: (p.folder / "ca.crt").unlink(), "server", "copy it from the server"),
}  # fmt: skip


@pytest.mark.parametrize(("spoil", "what", "why"), SPOILT.values(), ids=SPOILT.keys())
def test_what_is_not_in_order_says_what_to_do_and_ends_with_2(place, spoil, what, why, capsys, monkeypatch):
    spoil(place)
    code, said = place.check(capsys, monkeypatch)
    assert code == 2
    assert not said[what][0]
    assert why in said[what][1]
    assert [name for name, (ok, _) in said.items() if not ok] == [what]


SERVERS = {
    "localhost:1": "cannot be reached: Connection refused",
    "127.0.0.2:{port}": "is not trusted: IP address mismatch",
    "no-such-host.invalid:1": "there is no such name",
    "localhost": "expected HOST:PORT",
}


@pytest.mark.parametrize(("server", "why"), SERVERS.items())
def test_a_server_that_cannot_be_used_says_why(made, server, why, capsys, monkeypatch):
    code, said = made.check(capsys, monkeypatch, server.format(port=made.port))
    assert (code, said["server"][0]) == (2, False)
    assert why in said["server"][1]
