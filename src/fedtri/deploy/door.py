"""Which nodes the SuperLink turned away, read from its log: Flower tells apps nothing of keys it does not know."""

import ast
import base64
import hashlib
import os
import re
from pathlib import Path

from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_der_public_key,
    load_pem_public_key,
    load_ssh_public_key,
)

LOGGED = "superlink.log"
"""The file's name under FLWR_HOME, as the server's start script gives it."""
MOST = 1 << 20
"""The most bytes of the log that are read at a time: strangers can make it grow."""
NAMED = 10
"""The most keys that are reported at a time, for the same reason."""
TURNED_AWAY = re.compile(r"Attempted to register SuperNode with public key: (b'[^']{1,2000}')")


class Door:
    """Reads what the log gets from now on; where there is no log, it reports nothing."""

    def __init__(self, path: Path | None = None) -> None:
        home = os.environ.get("FLWR_HOME")
        self.path = path or (Path(home) / LOGGED if home else None)
        self._seen: set[str] = set()
        self._at = self._size()

    def turned_away(self) -> list[str]:
        """The keys turned away since the last call, each once, as `ssh-keygen -lf KEY.pub` shows fingerprints."""
        size = self._size()
        start = max(self._at if self._at <= size else 0, size - MOST)  # a smaller log is a new one
        self._at = size
        if self.path is None or start == size:
            return []
        with self.path.open("rb") as log:
            log.seek(start)
            text = log.read(size - start).decode(errors="replace")
        found = sorted({fingerprint(_bytes(key)) for key in TURNED_AWAY.findall(text)} - self._seen)[:NAMED]
        self._seen |= set(found)
        return found

    def _size(self) -> int:
        return self.path.stat().st_size if self.path is not None and self.path.exists() else 0


def _bytes(said: str) -> bytes:
    """The bytes of this Python literal; of any other text, the text itself."""
    try:
        return ast.literal_eval(said)
    except (SyntaxError, ValueError):
        return said.encode()


def fingerprint(key: bytes) -> str:
    """OpenSSH's SHA-256 fingerprint of a public key; of bytes that are no key, a fingerprint of the bytes."""
    for load in (load_pem_public_key, load_ssh_public_key, load_der_public_key):
        try:
            found = load(key).public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
        except Exception:  # whatever a stranger's bytes make a reader say
            continue
        key = base64.b64decode(found.split()[1])
        break
    return "SHA256:" + base64.b64encode(hashlib.sha256(key).digest()).decode().rstrip("=")
