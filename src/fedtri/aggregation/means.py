"""Weighted means of the clients' tensors, and how the server keeps what it sends: everyone's, or each client's own."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from fedtri.adapters.layout import Factors, Key, only
from fedtri.messages import Reply
from fedtri.state import ServerState


def example_weights(replies: Sequence[Reply]) -> Float[Tensor, "m"]:
    """p_k = n_k / Σ n, in float64."""
    counts = torch.tensor([reply.num_examples for reply in replies], dtype=torch.float64)
    return counts / counts.sum()


def counted(replies: Sequence[Reply], weights: str) -> Sequence[Reply]:
    """The replies as they count in a mean: "examples" as they are, "uniform" each as one example."""
    return replies if weights == "examples" else [replace(reply, num_examples=1) for reply in replies]


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


def mean_of(X: Float[Tensor, "layers m a b"], weights: Float[Tensor, "m"]) -> Float[Tensor, "layers a b"]:
    """Σ_k p_k X_k of every layer, accumulated in float64."""
    return torch.einsum("k,lkab->lab", weights, X.double()).to(X.dtype)


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
