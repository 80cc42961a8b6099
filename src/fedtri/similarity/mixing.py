"""From similarities to mixing weights: w_ij ∝ similarity_ij, each row sums to 1 (CE-LoRA, arXiv:2503.23869)."""

import torch
from jaxtyping import Float
from torch import Tensor

from fedtri.errors import FedtriError


def row_stochastic(
    similarity: Float[Tensor, "m m"],
    *,
    temperature: float | None = None,
    top_k: int | None = None,
    out: Float[Tensor, "m m"] | None = None,
) -> Float[Tensor, "m m"]:
    """Mixing weights: each row of a similarity (not negative, positive diagonal) divided by its sum.

    With a temperature, softmax(row / temperature) instead. With top_k, each client keeps its k most similar,
    itself always among them, and the rest weigh 0. `out=similarity` works in place, a block of rows at a
    time.

    Raises FedtriError when temperature is not above 0 or top_k is below 1.
    """
    if temperature is not None and not temperature > 0:
        raise FedtriError(f"temperature: expected a number above 0, got {temperature}: leave it out for plain weights")
    if top_k is not None and top_k < 1:
        raise FedtriError(f"top_k: expected 1 or more, got {top_k}: 1 keeps each client to itself")
    weights = similarity.clone() if out is None else out.copy_(similarity)
    for first, rows in zip(range(0, len(weights), 512), weights.split(512), strict=True):
        if top_k is not None and top_k < len(weights):
            order = rows.clone()
            order.diagonal(first).fill_(torch.inf)
            kept = order.topk(top_k).indices
            chosen = rows.gather(1, kept)
            rows.fill_(0 if temperature is None else -torch.inf).scatter_(1, kept, chosen)
        if temperature is None:
            rows.div_(rows.sum(1, keepdim=True))
        else:
            rows.copy_((rows / temperature).softmax(1))
    return weights
