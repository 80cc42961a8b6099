"""Writes the folder of a federation (`fedtri deploy init`): what the server, each site and their keepers need.

server/         certificates, the sites' public keys, app/ (what `flwr run` runs), and the scripts start, register, run
sites/NAME/     the site's key pair, the authority's certificate, node.toml, and the scripts start and check
authority.key   signs further certificates; keep it off the network, or delete it
"""

import re
import shutil
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from string import Template

from fedtri.deploy import certificates
from fedtri.deploy.door import LOGGED
from fedtri.errors import FedtriError

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
FIRST_OWN_PORT = 18101
"""The port of the first site's SuperNode. SuperNodes on one machine need different ports."""


def write(folder: Path, *, clients: Sequence[str], labels: Sequence[str], host: str, port: int) -> list[Path]:
    """Write everything that a federation of these clients needs. Returns the folders to hand out, the server's first.

    Raises FedtriError for a name that cannot be a file's, fewer than two clients or labels, or a folder in use.
    """
    for what, names in (("--clients", clients), ("--labels", labels)):
        if len(names) < 2 or len(set(names)) < len(names):
            raise FedtriError(f"{what}: expected at least two names, each once, got {', '.join(names) or 'none'}")
    if wrong := [name for name in clients if not NAME.fullmatch(name)]:
        raise FedtriError(f"--clients: {wrong[0]!r} is no name; expected letters, digits, '.', '_' and '-'")
    if not re.fullmatch(r"[A-Za-z0-9.:-]+", host):
        raise FedtriError(f"--host: expected a name or an address, got {host!r}")
    if folder.exists() and any(folder.iterdir()):
        raise FedtriError(f"{folder}: is not empty, expected an empty or new folder; choose another")
    values = {
        "clients": ", ".join(f'"{name}"' for name in clients),
        "labels": ", ".join('"' + label.replace("\\", "\\\\").replace('"', '\\"') + '"' for label in labels),
        "minimum": min(2, len(clients)), "host": host, "port": port,
    }  # fmt: skip
    signer = certificates.authority()
    _put(folder / "authority.key", _private(signer), 0o600)
    server = _server(folder / "server", signer, clients, values)
    sites = [_site(folder / "sites" / name, signer, number, values) for number, name in enumerate(clients)]
    for site in sites:
        shutil.copy(site / "key.pub", server / "keys" / f"{site.name}.pub")
    compose = [_text("compose-server.yml", values)]
    compose += [_text("compose-site.yml", {"client": name, "superlink": f"{host}:{port}"}) for name in clients]
    _put(folder / "compose.yml", "".join(compose).encode())
    _put(folder / "Dockerfile", _text("Dockerfile", {}).encode())
    return [server, *sites]


def _server(folder: Path, signer: certificates.Authority, clients: Sequence[str], values: Mapping[str, object]) -> Path:
    hosts = list(dict.fromkeys([str(values["host"]), "localhost", "127.0.0.1"]))
    certificate, key = certificates.server(signer, hosts)
    _put(folder / "ca.crt", signer.certificate)
    _put(folder / "server.pem", certificate)
    _put(folder / "server.key", key, 0o600)
    for script in ("environment", "register", "run"):
        _put(folder / script, _text(script, values).encode(), 0o755)
    _put(folder / "start", _text("superlink", {**values, "log": LOGGED}).encode(), 0o755)
    _put(folder / "flower.toml", _text("flower.toml", values).encode())
    for file in ("federation.toml", "pyproject.toml", "fedtri_app.py"):
        text = _text(file, values) if file == "federation.toml" else _source(file)
        _put(folder / "app" / file, text.encode())
    unit = {"unit": "fedtri-server", "description": "fedtri's server (Flower SuperLink)", "folder": "server"}
    _put(folder / "fedtri-server.service", _text("unit.service", unit).encode())
    (folder / "keys").mkdir()
    return folder


def _site(folder: Path, signer: certificates.Authority, number: int, values: Mapping[str, object]) -> Path:
    private, public = certificates.pair()
    _put(folder / "key", private, 0o600)
    _put(folder / "key.pub", public)
    _put(folder / "ca.crt", signer.certificate)
    own = {**values, "client": folder.name, "own_port": FIRST_OWN_PORT + number}
    _put(folder / "node.toml", _text("node.toml", own).encode())
    _put(folder / "federation.toml", _text("federation.toml", own).encode())
    for script, source in (("environment", "environment"), ("start", "supernode"), ("check", "check")):
        _put(folder / script, _text(source, own).encode(), 0o755)
    unit = {"unit": "fedtri-site", "description": "a fedtri site (Flower SuperNode)", "folder": "site"}
    _put(folder / "fedtri-site.service", _text("unit.service", unit).encode())
    return folder


def _private(signer: certificates.Authority) -> bytes:
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    return signer.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _source(name: str) -> str:
    return resources.files("fedtri.deploy").joinpath("files", name).read_text(encoding="utf-8")


def _text(name: str, values: Mapping[str, object]) -> str:
    return Template(_source(name)).substitute(values)


def _put(path: Path, data: bytes, mode: int = 0o644) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch(mode=mode)
    path.write_bytes(data)
