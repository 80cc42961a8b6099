"""A federation's state after a round, as files: safetensors and JSON, written whole or not at all, checked when read.

checkpoints/00003.json names the server's tensors, every client's current file and their digests. Resuming takes the
newest round whose files are all as they were written; the one before it is kept for the case that they are not.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from fedtri.adapters.layout import Factors, Key, key_name, parse_key
from fedtri.errors import FedtriError
from fedtri.similarity import sketches
from fedtri.state import ServerState
from fedtri.storage.client_store import ClientStore, Saved, read_checked, write_atomic

KEPT = 2


@dataclass(frozen=True)
class Checkpoint:
    """What a run needs to go on: the server's state, which file is each client's, and the round's log line."""

    state: ServerState
    clients: Mapping[str, Saved]
    line: Mapping[str, Any]


def save(folder: Path, state: ServerState, store: ClientStore, line: Mapping[str, Any]) -> None:
    """Write the checkpoint of this round and drop all but the last two."""
    tensors = safetensors.torch.save(_tensors(state))
    server = Saved(f"{state.round:05}.safetensors", write_atomic(folder / f"{state.round:05}.safetensors", tensors))
    manifest = {
        "round": state.round,
        "line": line,
        "server": asdict(server),
        "clients": {client: asdict(saved) for client, saved in store.current.items()},
        "changed": {key_name(key): round for key, round in state.changed.items()},
        "changed_personal": state.changed_personal,
        "delivered": state.delivered,
        "sketches": list(state.sketches),
    }
    body = json.dumps({**manifest, "digest": _digest(manifest)})
    write_atomic(folder / f"{state.round:05}.json", body.encode())
    manifests = sorted(folder.glob("*.json"))
    for old in manifests[:-KEPT]:
        old.unlink()
        old.with_suffix(".safetensors").unlink(missing_ok=True)
    keep = set()
    for path in manifests[-KEPT:-1]:
        keep |= {saved["file"] for saved in _manifest(path)["clients"].values()}
    store.prune(keep)


def load(folder: Path, clients: Path) -> Checkpoint | None:
    """The newest checkpoint that is whole, or None where there is none. Raises FedtriError when all are damaged."""
    reasons = []
    for path in sorted(folder.glob("*.json"), reverse=True):
        try:
            return _load(path, clients)
        except FedtriError as error:
            reasons.append(str(error))
    if reasons:
        raise FedtriError(f"{folder}: no checkpoint is whole: {'; '.join(reasons)}")
    return None


def _load(path: Path, clients: Path) -> Checkpoint:
    manifest = _manifest(path)
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
    tensors = _named("shared", "", state.shared)
    for kind, table in (("personal", state.personal), ("seen", state.seen), ("memory", state.memory)):
        for client, factors in table.items():
            tensors |= _named(kind, client, factors)
    for client, said in state.sketches.items():
        data = np.frombuffer(bytearray(sketches.encode(said)), np.uint8)
        size = next((mixture.means.shape[1] for mixture in said.mixtures.values()), 0)
        tensors[json.dumps(["sketch", client, [len(said.counts), size]])] = torch.from_numpy(data)
    for name, matrix in state.similarity.items():
        tensors[json.dumps(["similarity", "", name])] = matrix.contiguous()
    tensors[json.dumps(["data_distance", "", ""])] = torch.from_numpy(np.ascontiguousarray(state.data_distance))
    return tensors


def _named(kind: str, client: str, factors: Factors) -> dict[str, Tensor]:
    return {json.dumps([kind, client, key_name(key)]): value.contiguous().clone() for key, value in factors.items()}


def _state(manifest: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> ServerState:
    tables: dict[str, dict[str, dict[Key, Tensor]]] = {"shared": {"": {}}, "personal": {}, "seen": {}, "memory": {}}
    sketches, similarity, distance = {}, {}, np.zeros((0, 0))
    for name, value in tensors.items():
        kind, client, rest = json.loads(name)
        if kind == "sketch":
            sketches[client] = sketches.decode(value.numpy().tobytes(), classes=rest[0], d=rest[1])
        elif kind == "similarity":
            similarity[rest] = value
        elif kind == "data_distance":
            distance = value.numpy()
        else:
            tables[kind].setdefault(client, {})[parse_key(rest)] = value
    return ServerState(
        round=manifest["round"],
        shared=tables["shared"][""],
        personal=tables["personal"],
        seen=tables["seen"],
        memory=tables["memory"],
        sketches={client: sketches[client] for client in manifest["sketches"]},
        data_distance=distance,
        similarity=similarity,
        changed={parse_key(name): round for name, round in manifest["changed"].items()},
        changed_personal=manifest["changed_personal"],
        delivered=manifest["delivered"],
    )
