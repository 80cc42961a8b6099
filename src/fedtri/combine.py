"""What methods share when they combine replies: weights by examples, weighted means, stacking."""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from fedtri.types import Factors, Key, Reply, ServerState, only


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
        result[key] = torch.tensordot(weights, stacked.double(), 1).to(first.dtype)
    return result


def share(state: ServerState, factors: Factors) -> ServerState:
    """The state with these tensors as everyone's."""
    return state.with_(
        shared={**state.shared, **factors}, changed={**state.changed, **dict.fromkeys(factors, state.round)}
    )


def personalise(state: ServerState, factors: Mapping[str, Factors]) -> ServerState:
    """The state with these tensors as each client's own."""
    return state.with_(
        personal={**state.personal, **factors},
        changed_personal={**state.changed_personal, **dict.fromkeys(factors, state.round)},
    )
