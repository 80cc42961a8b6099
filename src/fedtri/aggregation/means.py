"""What methods share when they combine replies: weights by examples, weighted means, stacked pairs of A and B."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from fedtri.adapters.layout import Factors, Key, only
from fedtri.aggregation import products
from fedtri.messages import Reply
from fedtri.state import ServerState


def example_weights(replies: Sequence[Reply]) -> Float[Tensor, "m"]:
    """p_k = n_k / Σ n, in float64."""
    counts = torch.tensor([reply.num_examples for reply in replies], dtype=torch.float64)
    return counts / counts.sum()


def mean(
    replies: Sequence[Reply], kinds: frozenset[str], weights: Float[Tensor, "m"] | None = None
) -> dict[Key, Tensor]:
    """Σ_k p_k θ_k of every tensor of these factors, accumulated in float64, in the tensors' own dtype."""
    weights = example_weights(replies) if weights is None else weights
    result = {}
    for key, first in only(replies[0].up, kinds).items():
        stacked = torch.stack([reply.up[key] for reply in replies])
        result[key] = torch.tensordot(weights.double(), stacked.double(), 1).to(first.dtype)
    return result


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
        B, A = solve(group)
        for i, layer in enumerate(group.layers):
            shared |= {Key(layer, "B"): B[i], Key(layer, "A"): A[i]}
    return share(state, shared)


def mean_of(X: Float[Tensor, "layers m a b"], weights: Float[Tensor, "m"]) -> Float[Tensor, "layers a b"]:
    """Σ_k p_k X_k of every layer, accumulated in float64."""
    return torch.einsum("k,lkab->lab", weights, X.double()).to(X.dtype)


def aligned(
    state: ServerState, group: Pairs, B: Float[Tensor, "layers d_out r"], A: Float[Tensor, "layers r d_in"]
) -> Pair:
    """The same product in the basis nearest to that of the pair last shared; as it is in the first round."""
    if Key(group.layers[0], "A") not in state.shared:
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


def share(state: ServerState, factors: Factors) -> ServerState:
    """The state with these tensors as everyone's."""
    changed = {**state.deliveries.shared, **dict.fromkeys(factors, state.round)}
    deliveries = replace(state.deliveries, shared=changed)
    return state.with_(shared={**state.shared, **factors}, deliveries=deliveries)


def personalise(state: ServerState, factors: Mapping[str, Factors]) -> ServerState:
    """The state with these tensors as each client's own."""
    changed = {**state.deliveries.personal, **dict.fromkeys(factors, state.round)}
    deliveries = replace(state.deliveries, personal=changed)
    return state.with_(personal={**state.personal, **factors}, deliveries=deliveries)
