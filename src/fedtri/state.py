"""All the server knows after a round; never mutated."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from jaxtyping import Float
from torch import Tensor

from fedtri.adapters.layout import Factors, Key
from fedtri.messages import Reply, Sketch

Tree = Mapping[str, Any]
"""Tensors under names, and such mappings under names."""


@dataclass(frozen=True)
class Scales:
    """Every client's rank and scale s = alpha / rank: from the configuration, never from a client's word."""

    alpha: float = 1.0
    ranks: Mapping[str, int] = field(default_factory=dict)

    def of(self, reply: Reply) -> float:
        """s_k = alpha / rank_k of the client that sent this (accepted) reply; 1 where there is no adapter."""
        rank = next((value.shape[0] for key, value in reply.up.items() if key.factor in "AC"), None)
        rank = self.ranks.get(reply.client, rank)
        return 1.0 if rank is None else self.alpha / rank


@dataclass(frozen=True)
class Deliveries:
    """When what comes down last changed, and up to which round each client has been sent what is its own."""

    shared: Mapping[Key, int] = field(default_factory=dict)
    """The round in which each shared tensor last changed."""
    personal: Mapping[str, int] = field(default_factory=dict)
    """The round in which each client's personal tensors last changed."""
    sent: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Similarity:
    """Matrices over clients, such as "data", "model" and "weights"."""

    clients: tuple[str, ...]
    """The client of each row and column."""
    matrices: Mapping[str, Float[Tensor, "m m"]]


@dataclass(frozen=True)
class ServerState:
    """All the server knows after `round` rounds; never mutated."""

    round: int = 0
    shared: Factors = field(default_factory=dict)
    """What everyone is sent; where ranks differ, of the largest rank and its scale, cut to size on the way down."""
    personal: Mapping[str, Factors] = field(default_factory=dict)
    """What one client is sent, over what is shared."""
    deliveries: Deliveries = Deliveries()
    sketches: Mapping[str, Sketch] = field(default_factory=dict)
    own: Tree = field(default_factory=dict)
    """The method's own state, as it likes; it is kept in checkpoints and never sent."""
    similarity: Similarity | None = None
    """What the method found in this round of how alike clients are, for the log and the report."""
    scales: Scales = Scales()

    def with_(self, **changes: Any) -> "ServerState":
        """A copy with some fields replaced."""
        return replace(self, **changes)
