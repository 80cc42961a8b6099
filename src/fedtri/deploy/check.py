"""`fedtri deploy check`: whether a site's settings, key, server, model and data are in order, before anyone waits."""

import socket
import ssl
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

import numpy as np
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_ssh_private_key,
    load_ssh_public_key,
)

from fedtri import config as configuration
from fedtri.config import Config
from fedtri.deploy import examples, site
from fedtri.deploy.terms import agreed
from fedtri.errors import FedtriError
from fedtri.methods import networked
from fedtri.runs.opening import Data, Machine, Opened, initial, open_model, open_site
from fedtri.runs.spec import Spec, method_of
from fedtri.storage.client_store import ClientStore

T = TypeVar("T")
SECONDS = 10.0
"""How long the server may take to answer."""


@dataclass(frozen=True)
class Finding:
    """What was looked at, whether it is in order, and what it is or what to do."""

    what: str
    ok: bool
    said: str


@dataclass(frozen=True)
class Place:
    """Where a site's files are, and where it will look for the server."""

    folder: Path
    federation: Path
    server: str


def check(place: Place) -> Iterator[Finding]:
    """All findings, in order. Where one fails, the findings that need it are left out."""
    settings = yield from _found("settings", lambda: _settings(place))
    yield from _found("key", lambda: _key(place.folder))
    yield from _found("server", lambda: _server(place))
    if settings is None:
        return
    config, node = settings
    model = yield from _found("model", lambda: _model(config, node))
    if model is not None:
        yield from _found("data", lambda: _data(config, node, *model))


def _found(what: str, look: Callable[[], tuple[str, T]]) -> Generator[Finding, None, T | None]:
    try:
        said, value = look()
    except FedtriError as error:
        yield Finding(what, False, str(error))
        return None
    yield Finding(what, True, said)
    return value


def _settings(place: Place) -> tuple[str, tuple[Config, site.Node]]:
    """node.toml and federation.toml agree, and the site's state can be written where others cannot read it."""
    path = place.folder / "node.toml"
    node = site.node_of(configuration.read(path), str(path))
    config = site.configured(place.federation, {}, node)
    networked(method_of(config))
    if node.client not in config.network.clients:
        raise FedtriError(
            f"{path}: client {node.client!r} is not among network.clients of {place.federation}: "
            f"{', '.join(config.network.clients)}; correct one of them"
        )
    state = Path(node.state)
    try:
        state.mkdir(mode=0o700, parents=True, exist_ok=True)
        (state / ".check").touch()
        (state / ".check").unlink()
    except OSError as error:
        raise FedtriError(f"{path}: state: {state} cannot be written to: {error.strerror}; choose another") from None
    if open_to := state.stat().st_mode & 0o077:
        raise FedtriError(f"{state}: others may read it (mode {open_to:03o}); run: chmod 700 {state}")
    return f"{node.client}, {config.method} over {len(config.network.clients)} sites", (config, node)


def _key(folder: Path) -> tuple[str, None]:
    """The private key can be read, by this user alone, and belongs to the public one that is registered."""
    private, public = folder / "key", folder / "key.pub"
    try:
        if private.stat().st_mode & 0o077:
            raise FedtriError(f"{private}: others may read it; run: chmod 600 {private}")
        own = load_ssh_private_key(private.read_bytes(), password=None)
        other = load_ssh_public_key(public.read_bytes())
    except OSError as error:
        raise FedtriError(f"{error.filename}: cannot be read: {error.strerror}; copy it from who made it") from None
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise FedtriError(f"{private}: is no key in OpenSSH's format without a password: {error}; make one") from None
    if not isinstance(own, ec.EllipticCurvePrivateKey):
        raise FedtriError(f"{private}: expected an ECDSA key, got another kind; run: ssh-keygen -t ecdsa -b 384 -f key")
    plain = [key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH) for key in (own.public_key(), other)]  # pyright: ignore
    if plain[0] != plain[1]:
        raise FedtriError(f"{public}: is not the public half of {private}; copy both from who made them")
    return f"{public} is what the server's keeper must have registered", None


def _server(place: Place) -> tuple[str, None]:
    """Something answers there, with a certificate for that name signed by the authority in ca.crt."""
    host, _, port = place.server.rpartition(":")
    host = host.strip("[]")
    if not host or not port.isdigit():
        raise FedtriError(f"--server: expected HOST:PORT, got {place.server!r}")
    authority = place.folder / "ca.crt"
    try:
        context = ssl.create_default_context(cafile=str(authority))
    except (OSError, ssl.SSLError) as error:
        raise FedtriError(
            f"{authority}: is no certificate that can be read: {error}; copy it from the server"
        ) from None
    try:
        with (
            socket.create_connection((host, int(port)), timeout=SECONDS) as plain,
            context.wrap_socket(plain, server_hostname=host) as secured,
        ):
            found = secured.getpeercert() or {}
    except socket.gaierror:
        raise FedtriError(f"{host}: there is no such name; correct --server or the name service") from None
    except ssl.SSLCertVerificationError as error:
        raise FedtriError(
            f"{place.server}: its certificate is not trusted: {error.verify_message}; copy ca.crt from the server's "
            "folder, or use the name that the certificate is for"
        ) from None
    except ssl.SSLError as error:
        raise FedtriError(f"{place.server}: does not speak TLS: {error.reason}; is it the server's port?") from None
    except OSError as error:
        raise FedtriError(
            f"{place.server}: cannot be reached: {error.strerror or error}; is the server started, and the port open "
            "from here?"
        ) from None
    until = datetime.fromtimestamp(ssl.cert_time_to_seconds(str(found["notAfter"])), UTC)
    days = (until - datetime.now(UTC)).days
    return f"{place.server} answers, its certificate is good for {days} days", None


def _model(config: Config, node: site.Node) -> tuple[str, tuple[Spec, Opened]]:
    """The model can be loaded with the federation's adapters in it."""
    spec = agreed(config)
    opened = open_model(spec, Machine.of(config))
    initial(spec, opened, spec.scales.ranks[node.client])
    return f"{config.model} on {opened.adapted.device}, {len(spec.layout.layers)} layers adapted", (spec, opened)


def _data(config: Config, node: site.Node, spec: Spec, opened: Opened) -> tuple[str, None]:
    """The data can be read, and there is enough to train and to test on; they are tokenised for the first round."""
    found = examples.load(config, node.client, Path(node.state) / "cache", spec.recipe, opened.processor)
    data = Data(found.examples, {node.client: found.split})
    open_site(spec, Machine.of(config), opened, data, ClientStore(Path(node.state)))
    sizes = f"{len(found.split.train)} examples to train, {len(found.split.test)} to test on"
    labels, names = found.examples.labels, spec.labels
    if labels is None or not names:
        return f"{config.data}: {sizes}", None
    counts = np.bincount(labels, minlength=len(names))
    return f"{config.data}: {sizes}; " + ", ".join(f"{n} {c}" for n, c in zip(names, counts, strict=True)), None
