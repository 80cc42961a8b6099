"""The leading singular vectors of one dense matrix, without the rest of its SVD.

Randomised subspace iteration: Q ← orth(M orth(Mᵀ Q)) from a random start, then the SVD of the small Qᵀ M (Halko,
Martinsson and Tropp, arXiv:0909.4061, algorithm 4.4).
"""

import torch
from jaxtyping import Float
from torch import Tensor

SPARE = 8
"""Directions that are iterated beside the wanted ones, which makes these converge."""
SWEEPS = 8


def leading(
    M: Float[Tensor, "d_out d_in"], rank: int, rng: torch.Generator
) -> tuple[Float[Tensor, "d_out rank"], Float[Tensor, "rank"], Float[Tensor, "d_in rank"]]:
    """(U, σ, V) of the `rank` largest singular values, in float64; exact where `rank` + SPARE reaches a side of M.

    The largest entry of every column of V is positive, so that two machines that round differently do not differ in a
    sign. Cost O(d_out d_in rank).
    """
    matrix = M.detach().double()
    width = min(rank + SPARE, *matrix.shape)
    start = torch.randn(matrix.shape[1], width, generator=rng, dtype=torch.float64).to(matrix.device)
    Q = torch.linalg.qr(matrix @ start).Q
    if width < min(matrix.shape):
        for _ in range(SWEEPS):
            Q = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.mT @ Q).Q).Q
    U, S, Vh = torch.linalg.svd(Q.mT @ matrix, full_matrices=False)
    left, right = (Q @ U)[:, :rank], Vh[:rank].mT
    signs = right.gather(0, right.abs().argmax(0, keepdim=True)).sign()
    return (left * signs).contiguous(), S[:rank].contiguous(), (right * signs).contiguous()
