"""A basis from the clients' first gradients: the leading singular vectors of their mean G = Σ p_k G_k of every layer.

A client sends the best approximation of its G_k by a few factors, as B = U√σ and A = √σVᵀ. G is never built: see
`products.product_svd`. A gradient step from ΔW = 0 moves every layer along −G, so of all bases of rank r this one holds
most of the first step (Eckart and Young); LoRA-SB uses it for one client (arXiv:2411.19557).
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from fedtri.adapters.layout import Key, only
from fedtri.aggregation import products
from fedtri.aggregation.means import example_weights
from fedtri.messages import Reply


def pooled(replies: Sequence[Reply], factors: frozenset[str], rank: int) -> dict[Key, Tensor]:
    """The basis of every layer.

    Args:
        replies: The clients' sketches of their gradients, in the order of their names: A and B of every layer.
        factors: Which of A (rows are right singular vectors) and B (columns are left ones) are wanted.
        rank: The rows of A and columns of B: the largest rank of a client.
    """
    weights = example_weights(replies)
    shapes: dict[tuple[int, int], list[str]] = {}
    for key, B in only(replies[0].up, frozenset("B")).items():
        shapes.setdefault((B.shape[0], replies[0].up[Key(key.layer, "A")].shape[1]), []).append(key.layer)
    found: dict[Key, Tensor] = {}
    for layers in shapes.values():
        most = max(rank, *(reply.up[Key(layers[0], "A")].shape[0] for reply in replies))
        stacks = [torch.stack([_stacked(replies, layer, factor, most) for layer in layers]) for factor in "BA"]
        U, _, Vh = products.product_svd(stacks[0], stacks[1], weights, rank)
        dtype = stacks[0].dtype
        for i, layer in enumerate(layers):
            vectors = {"A": Vh[i], "B": U[i]}
            found |= {Key(layer, factor): vectors[factor].to(dtype).contiguous() for factor in sorted(factors)}
    return found


def _stacked(replies: Sequence[Reply], layer: str, factor: str, count: int) -> Tensor:
    """Everyone's factor of one layer, filled up with zeros so that there are always enough singular vectors."""
    own = [reply.up[Key(layer, factor)] for reply in replies]
    if factor == "A":
        return torch.stack([pad(A, (0, 0, 0, count - A.shape[0])) for A in own])
    return torch.stack([pad(B, (0, count - B.shape[1])) for B in own])
