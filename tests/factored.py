"""Drawn clients' pairs B, A and weights, and the dense definitions that the algebra in factors is held to."""

import torch
from torch import Tensor

D_OUT, D_IN, LAYERS = 13, 9, 3
Clients = tuple[Tensor, Tensor, Tensor]


def draw(
    m: int, r: int, *, ranks: list[int] | None = None, d_out: int = D_OUT, d_in: int = D_IN, seed: int = 0
) -> Clients:
    """B, A and weights of m clients; clients of smaller rank zero-padded."""
    g = torch.Generator().manual_seed(seed)
    B = torch.randn(LAYERS, m, d_out, r, generator=g, dtype=torch.float64)
    A = torch.randn(LAYERS, m, r, d_in, generator=g, dtype=torch.float64)
    for k, rank in enumerate(ranks or []):
        B[:, k, :, rank:], A[:, k, rank:] = 0, 0
    weights = torch.rand(m, generator=g, dtype=torch.float64) + 0.1
    return B, A, weights / weights.sum()


CASES = {
    "plain": lambda: draw(3, 2),
    "one client": lambda: draw(1, 2),
    "mixed ranks": lambda: draw(3, 3, ranks=[1, 2, 3]),
    "more columns than rows": lambda: draw(8, 3),
    "wide on one side": lambda: draw(5, 2, d_out=24),
    "identical clients": lambda: tuple(x[:, :1].expand_as(x) if x.ndim == 4 else x for x in draw(4, 2)),
    "one silent layer": lambda: tuple(
        x * torch.tensor([1, 0, 1.0])[:, None, None, None] if x.ndim == 4 else x for x in draw(3, 2)
    ),
}


def dense_mean(B: Tensor, A: Tensor, weights: Tensor) -> Tensor:
    return torch.einsum("k,lkor,lkri->loi", weights, B, A)


def fedavg(B: Tensor, A: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    return torch.einsum("k,lkor->lor", weights, B), torch.einsum("k,lkri->lri", weights, A)


def error(clients: Clients, B_hat: Tensor, A_hat: Tensor) -> Tensor:
    return torch.linalg.matrix_norm(dense_mean(*clients) - B_hat @ A_hat)


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)
