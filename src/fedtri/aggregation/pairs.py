"""The clients' pairs of A and B, stacked by shape: what methods solve for, of one rank or of mixed ranks.

Where ranks differ, smaller pairs are zero-padded to the largest rank r_max, and B_k is multiplied by r_max / r_k: every
pair is then in the units of the largest rank's scale alpha / r_max. On the way down this is undone (`cut`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from fedtri.adapters.layout import Factors, Key, only
from fedtri.aggregation import products
from fedtri.aggregation.means import share
from fedtri.messages import Reply
from fedtri.state import ServerState


@dataclass(frozen=True)
class Pairs:
    """Every reply's B and A of the layers of one shape, in the units of `scale`: its update is scale · BA."""

    layers: tuple[str, ...]
    B: Float[Tensor, "layers m d_out r"]
    A: Float[Tensor, "layers m r d_in"]
    scale: float


def pairs(state: ServerState, replies: Sequence[Reply]) -> list[Pairs]:
    """The replies' A and B by shape; smaller ranks are zero-padded, their B rescaled to the largest rank's scale."""
    shapes: dict[tuple[int, int], list[str]] = {}
    for key, B in only(replies[0].up, frozenset("B")).items():
        shapes.setdefault((B.shape[0], replies[0].up[Key(key.layer, "A")].shape[1]), []).append(key.layer)
    names = next(iter(shapes.values()))
    own = [reply.up[Key(names[0], "A")].shape[0] for reply in replies]
    rank = max([*own, *state.scales.ranks.values()])

    def padded(layer: str, factor: str) -> Float[Tensor, "m a b"]:
        values = (reply.up[Key(layer, factor)] for reply in replies)
        if factor == "A":
            return torch.stack([pad(A, (0, 0, 0, rank - r)) for A, r in zip(values, own, strict=True)])
        return torch.stack([pad(B, (0, rank - r)) * (rank / r) for B, r in zip(values, own, strict=True)])

    return [
        Pairs(
            tuple(layers),
            torch.stack([padded(layer, "B") for layer in layers]),
            torch.stack([padded(layer, "A") for layer in layers]),
            state.scales.alpha / rank,
        )
        for layers in shapes.values()
    ]


Pair = tuple[Float[Tensor, "layers d_out r"], Float[Tensor, "layers r d_in"]]


def share_pairs(state: ServerState, replies: Sequence[Reply], solve: Callable[[Pairs], Pair]) -> ServerState:
    """The state with one B and A a layer, which `solve` makes of all replies', shape by shape."""
    shared: dict[Key, Tensor] = {}
    for group in pairs(state, replies):
        shared |= by_layer(group, *solve(group))
    return share(state, shared)


def by_layer(group: Pairs, B: Float[Tensor, "layers d_out r"], A: Float[Tensor, "layers r d_in"]) -> dict[Key, Tensor]:
    """One B and A of each layer of the group, under their keys."""
    found = {Key(layer, "B"): B[i] for i, layer in enumerate(group.layers)}
    return found | {Key(layer, "A"): A[i] for i, layer in enumerate(group.layers)}


def aligned(
    state: ServerState, group: Pairs, B: Float[Tensor, "layers d_out r"], A: Float[Tensor, "layers r d_in"]
) -> Pair:
    """The same product in the basis nearest to that of the pair last shared; as it is where none was shared yet."""
    if not {Key(group.layers[0], factor) for factor in "AB"} <= state.shared.keys():
        return B, A
    before = [torch.stack([state.shared[Key(layer, factor)] for layer in group.layers]) for factor in "BA"]
    return products.procrustes_align(B, A, *before)


def add_dense(state: ServerState, group: Pairs, update: Float[Tensor, "layers d_out d_in"]) -> dict[Key, Tensor]:
    """The running total W of each layer of the group with scale · update added."""
    total = {}
    for i, layer in enumerate(group.layers):
        step = group.scale * update[i]
        before = state.shared.get(Key(layer, "W"))
        total[Key(layer, "W")] = (step if before is None else before + step).to(group.B.dtype)
    return total


def cut(factors: Factors, rank: int | None) -> Factors:
    """Shared factors at a client's own rank: A's first rows and B's first columns, B rescaled so that s · BA stays."""
    result = dict(factors)
    for key, value in factors.items():
        if rank is None or key.factor not in "AB":
            continue
        full = value.shape[0 if key.factor == "A" else 1]
        if rank < full:
            result[key] = value[:rank] if key.factor == "A" else value[:, :rank] * (rank / full)
    return result


def revive(own: Factors, down: Factors, fresh: Callable[[], Factors]) -> Factors:
    """A way to receive: what came down replaces the client's own, but for rows of A whose pair came down zero.

    A pair is a row of A and the matching column of B. One that is zero on both sides could never learn again, as each
    side's gradient is a multiple of the other: there the client keeps its own row of A, which changes no product.
    """
    held = {**own, **down}
    for key in [key for key in down if key.factor == "A" and Key(key.layer, "B") in down]:
        A, B = down[key], down[Key(key.layer, "B")]
        dead = ~A.any(1) & ~B.any(0)
        held[key] = torch.where(dead[:, None], own[key].to(A), A)
    return held
