"""All that the server knows after a round. It is never mutated."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from jaxtyping import Float
from torch import Tensor

from fedtri.adapters.layout import Factors, Key
from fedtri.messages import Held, Reply, Sketch

Tree = Mapping[str, Any]
"""Tensors under names, and such mappings under names."""


@dataclass(frozen=True)
class Scales:
    """Every client's rank and scale s = alpha / rank. They come from the configuration; a client cannot set them."""

    alpha: float = 1.0
    ranks: Mapping[str, int] = field(default_factory=dict)

    def of(self, reply: Reply) -> float:
        """s_k = alpha / rank_k of the client that sent this reply; 1 without an adapter. The reply has been checked."""
        rank = next((value.shape[0] for key, value in reply.up.items() if key.factor in "AC"), None)
        rank = self.ranks.get(reply.client, rank)
        return 1.0 if rank is None else self.alpha / rank


@dataclass(frozen=True)
class Deliveries:
    """When each tensor that is sent down last changed, and when each client was last sent anything."""

    shared: Mapping[Key, int] = field(default_factory=dict)
    """The round in which each shared tensor last changed."""
    personal: Mapping[str, int] = field(default_factory=dict)
    """The round in which each client's personal tensors last changed."""
    sent: Mapping[str, int] = field(default_factory=dict)
    """The round of the last state that each client was sent."""


@dataclass(frozen=True)
class Similarity:
    """Matrices over clients, such as "data", "model" and "weights"."""

    clients: tuple[str, ...]
    """The client of each row and column."""
    matrices: Mapping[str, Float[Tensor, "m m"]]


@dataclass(frozen=True)
class ServerState:
    """All that the server knows after `round` rounds. It is never mutated."""

    round: int = 0
    shared: Factors = field(default_factory=dict)
    """What every client is sent, at the largest rank and its scale. A client of smaller rank is sent it truncated."""
    personal: Mapping[str, Factors] = field(default_factory=dict)
    """What only one client is sent. It replaces shared tensors of the same key."""
    deliveries: Deliveries = Deliveries()
    held: Mapping[str, Held] = field(default_factory=dict)
    """What each client has of what it was sent."""
    sketches: Mapping[str, Sketch] = field(default_factory=dict)
    own: Tree = field(default_factory=dict)
    """The method's own state. Checkpoints keep it; it is never sent."""
    similarity: Similarity | None = None
    """How similar the clients are, as the method found in this round; for the log and the report."""
    scales: Scales = Scales()

    def with_(self, **changes: Any) -> "ServerState":
        """A copy with some fields replaced."""
        return replace(self, **changes)
