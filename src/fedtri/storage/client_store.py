"""Each client's own tensors on its own disk, one safetensors file a save, never overwritten in place.

A save writes a new file and remembers it as current; files that a checkpoint refers to stay until they are pruned. So
a run that is killed in the middle of a round finds every client as the last checkpoint left it. Idle clients cost no
memory.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch

from fedtri import atomic
from fedtri.adapters.layout import Factors, key_name, parse_key
from fedtri.errors import FedtriError


@dataclass(frozen=True)
class Saved:
    """A file and the digest of its bytes."""

    file: str
    digest: str


def beside(client: str, name: str) -> str:
    """The name under which a client keeps further tensors beside its own. No client's own name has a "+"."""
    return f"{client}+{name}"


def owner(name: str) -> str:
    """The client to which what is kept under this name belongs."""
    return name.partition("+")[0]


class ClientStore:
    """Clients' tensors under one folder; `current` says which file holds what is kept under each name.

    A name is a client's own, or `beside` it.
    """

    def __init__(self, folder: Path, current: Mapping[str, Saved] | None = None) -> None:
        self.folder, self.current = folder, dict(current or {})

    def load(self, client: str) -> Factors | None:
        """The client's tensors as last saved, or None for one that has not trained yet."""
        if (saved := self.current.get(client)) is None:
            return None
        tensors = safetensors.torch.load(read_checked(self.folder / saved.file, saved.digest))
        return {parse_key(name): value for name, value in tensors.items()}

    def save(self, client: str, factors: Factors, tag: str) -> None:
        """Write the client's tensors under a name of their own and make them current."""
        data = safetensors.torch.save({key_name(key): value.contiguous() for key, value in factors.items()})
        file = f"{client}/{tag}.safetensors"
        self.current[client] = Saved(file, atomic.write_bytes(self.folder / file, data))

    def point(self, name: str, to: str) -> None:
        """Let `name` be what is kept under `to` now, without writing it again; where nothing is, forget `name`."""
        if to in self.current:
            self.current[name] = self.current[to]
        else:
            self.current.pop(name, None)

    def prune(self, keep: set[str]) -> None:
        """Delete the files that are neither current nor in `keep`."""
        keep = keep | {saved.file for saved in self.current.values()}
        for path in self.folder.glob("*/*.safetensors"):
            if str(path.relative_to(self.folder)) not in keep:
                path.unlink()


def read_checked(path: Path, digest: str) -> bytes:
    """The file's bytes. Raises FedtriError where it is missing or not what was written."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise FedtriError(f"{path}: cannot be read: {error.strerror}") from None
    if hashlib.sha256(data).hexdigest() != digest:
        raise FedtriError(f"{path}: the file was cut short or changed since it was written")
    return data
