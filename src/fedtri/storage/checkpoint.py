"""A federation's state after a round, as files: safetensors and JSON, written whole or not at all, checked when read.

checkpoints/00003.json names the server's tensors, every client's current file and their digests. Resuming takes the
newest round whose files are all as they were written; the one before it is kept for the case that they are not.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from fedtri import atomic
from fedtri.adapters.layout import Key, key_name, parse_key
from fedtri.errors import FedtriError
from fedtri.messages import Held, Sketch
from fedtri.similarity import sketches
from fedtri.state import Deliveries, ServerState, Similarity, Tree
from fedtri.storage.client_store import ClientStore, Saved, read_checked
from fedtri.storage.run_directory import LAYOUT

KEPT = 2
"""Checkpoints that a run keeps."""


@dataclass(frozen=True)
class Checkpoint:
    """What a run needs to go on: the server's state, which file is each client's, and the round's log line."""

    state: ServerState
    clients: Mapping[str, Saved]
    line: Mapping[str, Any]


def save(folder: Path, state: ServerState, store: ClientStore, line: Mapping[str, Any]) -> None:
    """Write the checkpoint of this round and drop all but the last two."""
    tensors = safetensors.torch.save(_tensors(state))
    file = f"{state.round:05}.safetensors"
    server = Saved(file, atomic.write_bytes(folder / file, tensors))
    manifest = {
        "layout": LAYOUT,
        "round": state.round,
        "line": line,
        "server": asdict(server),
        "clients": {client: asdict(saved) for client, saved in store.current.items()},
        "deliveries": {
            "shared": {key_name(key): round for key, round in state.deliveries.shared.items()},
            "personal": state.deliveries.personal,
            "sent": state.deliveries.sent,
        },
        "similar": state.similarity.clients if state.similarity else [],
        "held": {client: held.rounds for client, held in state.held.items()},
        "sketches": list(state.sketches),
    }
    body = json.dumps({**manifest, "digest": _digest(manifest)})
    atomic.write_bytes(folder / f"{state.round:05}.json", body.encode())
    manifests = sorted(folder.glob("*.json"))
    for old in manifests[:-KEPT]:
        old.unlink()
        old.with_suffix(".safetensors").unlink(missing_ok=True)
    keep = set()
    for path in manifests[-KEPT:-1]:
        keep |= {saved["file"] for saved in _manifest(path)["clients"].values()}
    store.prune(keep)


def load(folder: Path, clients: Path) -> Checkpoint | None:
    """The newest checkpoint that is whole, or None where there is none.

    Args:
        folder: Where the checkpoints are.
        clients: Where the clients' own tensors are.

    Raises:
        FedtriError: Where all are damaged, or another version of fedtri wrote one.
    """
    reasons = []
    for path in sorted(folder.glob("*.json"), reverse=True):
        try:
            manifest = _manifest(path)
            if manifest.get("layout", 1) == LAYOUT:
                return _load(path, manifest, clients)
        except FedtriError as error:
            reasons.append(str(error))
            continue
        raise FedtriError(
            f"{path}: the checkpoint has layout {manifest.get('layout', 1)}, expected {LAYOUT}: another version of "
            "fedtri wrote it; finish the run with that version, or start it anew"
        )
    if reasons:
        raise FedtriError(f"{folder}: no checkpoint is whole: {'; '.join(reasons)}")
    return None


def _load(path: Path, manifest: Mapping[str, Any], clients: Path) -> Checkpoint:
    server = Saved(**manifest["server"])
    saved = {client: Saved(**entry) for client, entry in manifest["clients"].items()}
    for entry in saved.values():
        read_checked(clients / entry.file, entry.digest)
    tensors = safetensors.torch.load(read_checked(path.parent / server.file, server.digest))
    return Checkpoint(_state(manifest, tensors), saved, manifest["line"])


def _manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads(path.read_text())
        digest = manifest.pop("digest")
    except (OSError, ValueError, AttributeError, KeyError):
        raise FedtriError(f"{path}: the checkpoint was cut short") from None
    if digest != _digest(manifest):
        raise FedtriError(f"{path}: the checkpoint was changed since it was written")
    return manifest


def _digest(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest).encode()).hexdigest()


def _tensors(state: ServerState) -> dict[str, Tensor]:
    """Every tensor of the state under its place, a JSON list."""
    tensors = {_place("shared", key_name(key)): value for key, value in state.shared.items()}
    for client, factors in state.personal.items():
        tensors |= {_place("personal", client, key_name(key)): value for key, value in factors.items()}
    for client, held in state.held.items():
        tensors |= {_place("held", client, key_name(key)): value for key, value in held.factors.items()}
    tensors |= {_place("own", *path): value for path, value in _leaves(state.own)}
    if state.similarity is not None:
        tensors |= {_place("similarity", name): matrix for name, matrix in state.similarity.matrices.items()}
    for client, said in state.sketches.items():
        size = next((mixture.means.shape[1] for mixture in said.mixtures.values()), 0)
        data = np.frombuffer(bytearray(sketches.encode(said)), np.uint8)
        tensors[_place("sketch", client, len(said.counts), size)] = torch.from_numpy(data)
    return {place: value.contiguous().clone() for place, value in tensors.items()}


def _place(*path: str | int) -> str:
    return json.dumps(path)


def _leaves(tree: Tree, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Tensor]]:
    """Every tensor of a method's own state, with the names that lead to it."""
    for name, value in tree.items():
        if isinstance(value, Tensor):
            yield (*path, name), value
        else:
            yield from _leaves(value, (*path, name))


def _state(manifest: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> ServerState:
    shared: dict[Key, Tensor] = {}
    personal: dict[str, dict[Key, Tensor]] = {}
    held: dict[str, dict[Key, Tensor]] = {}
    own: dict[str, Any] = {}
    matrices: dict[str, Tensor] = {}
    said: dict[str, Sketch] = {}
    for place, value in tensors.items():
        kind, *path = json.loads(place)
        if kind == "shared":
            shared[parse_key(path[0])] = value
        elif kind == "personal":
            personal.setdefault(path[0], {})[parse_key(path[1])] = value
        elif kind == "held":
            held.setdefault(path[0], {})[parse_key(path[1])] = value
        elif kind == "own":
            inner = own
            for name in path[:-1]:
                inner = inner.setdefault(name, {})
            inner[path[-1]] = value
        elif kind == "similarity":
            matrices[path[0]] = value
        else:
            said[path[0]] = sketches.decode(value.numpy().tobytes(), classes=path[1], d=path[2])
    delivered = manifest["deliveries"]
    return ServerState(
        round=manifest["round"],
        shared=shared,
        personal=personal,
        deliveries=Deliveries(
            {parse_key(name): round for name, round in delivered["shared"].items()},
            delivered["personal"],
            delivered["sent"],
        ),
        held={client: Held(held.get(client, {}), rounds) for client, rounds in manifest["held"].items()},
        sketches={client: said[client] for client in manifest["sketches"]},
        own=own,
        similarity=Similarity(tuple(manifest["similar"]), matrices) if matrices else None,
    )
