"""What a client remembers of the wire on its own disk: what it has of the server, and what its replies have lost.

A request says on what it builds. The client keeps what it remembered before and after its last message: the
server goes on from the earlier one where the answer never reached it. Where neither is meant, the client says that
it is behind, and is sent all that it needs.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fedtri.adapters.layout import Factors, Key
from fedtri.communication.framing import NOTHING
from fedtri.errors import FedtriError
from fedtri.messages import Held
from fedtri.storage.client_store import ClientStore, beside

AFTER, BEFORE = "wire", "wire-before"
"""Beside a client's own tensors: what it remembers after its last message, and what it remembered before."""
ROUNDS = Key("rounds", "n")
HELD, LOST = "held.", "lost."
USED = 3
"""Of the bytes that stand for what a client has, those of the last round that was used."""


class BehindError(FedtriError):
    """A client no longer has what it was sent before."""


@dataclass(frozen=True)
class Memory:
    """What a client remembers of the wire."""

    held: Held = field(default_factory=Held)
    lost: Factors = field(default_factory=dict)
    """What rounding its replies has lost so far."""


def base_of(held: Held | None) -> bytes:
    """8 bytes that stand for what a client has: 3 of its last round that was used, 5 of a digest; NOTHING for None."""
    if held is None:
        return NOTHING
    found = hashlib.blake2b(digest_size=8 - USED)
    for key in sorted(held.factors):
        found.update(repr(key).encode())
        found.update(held.factors[key].contiguous().numpy().tobytes())
    return held.rounds.to_bytes(USED) + found.digest()


def rounds_used(base: bytes) -> int:
    """The last round, counted from 1, of which the server used this client's reply; 0: none."""
    return int.from_bytes(base[:USED])


def recall(store: ClientStore, client: str, base: bytes, *, follows: bool) -> Memory:
    """What the client remembers of the state on which a request builds; what it remembered after it is forgotten.

    Args:
        store: The client's files.
        client: Its name.
        base: The request's `base`.
        follows: Whether the wire sends differences; elsewhere nothing but the client's own tensors is needed.

    Raises:
        BehindError: Where the client has no such state.
    """
    after, before = beside(client, AFTER), beside(client, BEFORE)
    if base == NOTHING:
        store.point(after, "")
        return Memory()
    if not follows and store.load(client) is not None:
        return Memory()
    for name in (after, before) if follows else ():
        found = _unpacked(store.load(name) or {})
        if base_of(found.held) == base:
            store.point(after, name)
            return found
    raise BehindError(f"{client}: what the server sent before is not on this disk; the server sends it anew")


def remember(store: ClientStore, client: str, memory: Memory, tag: str) -> None:
    """Keep this as what the client remembers, beside what it remembered before."""
    after = beside(client, AFTER)
    store.point(beside(client, BEFORE), after)
    store.save(after, _packed(memory), tag)


def _packed(memory: Memory) -> dict[Key, Tensor]:
    held = {Key(key.layer, HELD + key.factor): value for key, value in memory.held.factors.items()}
    lost = {Key(key.layer, LOST + key.factor): value for key, value in memory.lost.items()}
    return {**held, **lost, ROUNDS: torch.tensor(memory.held.rounds)}


def _unpacked(factors: Mapping[Key, Tensor]) -> Memory:
    held, lost = (
        {Key(key.layer, key.factor.removeprefix(part)): v for key, v in factors.items() if key.factor.startswith(part)}
        for part in (HELD, LOST)
    )
    return Memory(Held(held, int(factors.get(ROUNDS, 0))), lost)
