"""From similarities to mixing weights: w_ij ∝ similarity_ij, each row sums to 1 (CE-LoRA, arXiv:2503.23869).

Shrunk weights are (1 − λ) / m + λ w_ij, with λ as large as the weights have shown to predict a client from the others;
at λ = 0 they are those of the plain mean. Ours.
"""

from collections.abc import Sequence

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


def shrunk(weights: Float[Tensor, "n m"], share: float) -> Float[Tensor, "n m"]:
    """(1 − λ) / m + λ w_ij, λ = `share` in [0, 1]: from the plain mean to the weights."""
    return (1 - share) / weights.shape[1] + share * weights


def predictive_share(trials: Sequence[tuple[Float[Tensor, "m m"], Float[Tensor, "m d"]]]) -> float:
    """λ in [0, 1]: how far the weights predict each client better than the plain mean of the others does.

    With w'_ij the weights of row i over the others alone, s_i = Σ_{j≠i} w'_ij x_j and m_i the mean of x_j, j ≠ i, λ
    minimises Σ_i ‖x_i − (1 − λ) m_i − λ s_i‖²: λ = Σ⟨x_i − m_i, s_i − m_i⟩ / Σ‖s_i − m_i‖². Where the weights say
    nothing of the clients, its expectation is 0; λ = 0 too where no client has others.

    Args:
        trials: (weights, x) with weights that were found without this x. If they were found from x itself, they
            would predict its noise, too.
    """
    gained, spread = 0.0, 0.0
    for weights, x in trials:
        m, others = len(x), weights.double() * (1 - torch.eye(len(x), dtype=torch.float64))
        total = others.sum(1, keepdim=True)
        rows, x = (total > 0)[:, 0], x.double()
        if m < 2 or not rows.any():
            continue
        mean = (x.sum(0) - x) / (m - 1)
        apart = (others[rows] / total[rows]) @ x - mean[rows]
        gained += float(((x - mean)[rows] * apart).sum())
        spread += float(apart.square().sum())
    return min(max(gained / spread, 0.0), 1.0) if spread > 0 else 0.0
