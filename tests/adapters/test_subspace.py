"""The leading singular vectors are those of the SVD, whatever the shape, and do not hang on rounding."""

import pytest
import torch

from fedtri.adapters.initial import initial_factors
from fedtri.adapters.layout import Key, Layer, Layout
from fedtri.adapters.subspace import leading


def matrix(d_out: int, d_in: int, decay: float, seed: int = 0) -> torch.Tensor:
    """Singular values 1, decay, decay², …"""
    rng = torch.Generator().manual_seed(seed)
    k = min(d_out, d_in)
    U, V = (torch.linalg.qr(torch.randn(d, k, generator=rng, dtype=torch.float64)).Q for d in (d_out, d_in))
    return U * decay ** torch.arange(k, dtype=torch.float64) @ V.mT


def start(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(("d_out", "d_in", "decay"), [(5, 7, 0.9), (7, 5, 0.9), (60, 90, 0.8), (90, 60, 0.8)])
def test_it_gives_what_the_whole_svd_gives(d_out, d_in, decay):
    """Seen to fail without sweeps, and with the sign turned in V alone."""
    M = matrix(d_out, d_in, decay)
    U, S, V = leading(M, 4, start())
    whole = torch.linalg.svd(M, full_matrices=False)
    torch.testing.assert_close(S, whole.S[:4], rtol=1e-7, atol=0)
    nearest = whole.U[:, :4] * whole.S[:4] @ whole.Vh[:4]
    torch.testing.assert_close(U * S @ V.mT, nearest, rtol=0, atol=1e-5)
    for X in (U, V):
        torch.testing.assert_close(X.mT @ X, torch.eye(4, dtype=torch.float64))


def test_neither_the_start_nor_rounding_turns_a_sign():
    """Another machine rounds otherwise, and must hold the same basis. Seen to fail without the rule for signs."""
    M = matrix(40, 30, 0.5)
    one = leading(M, 3, start(1))
    for V in (one[2], leading(-M.mT, 3, start(1))[2]):
        assert (V.gather(0, V.abs().argmax(0, keepdim=True)) > 0).all()
    for seed in range(2, 12):
        other = leading((M * (1 + 1e-12)).contiguous(), 3, start(seed))
        for mine, theirs in zip(one, other, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-6)


def test_a_matrix_of_less_rank_still_gives_orthonormal_vectors():
    """A gradient may be zero; its basis must not be."""
    for M in (torch.zeros(6, 5), matrix(6, 5, 1.0)[:, :1] @ matrix(6, 5, 1.0)[:1, :]):
        U, _, V = leading(M, 3, start())
        for X in (U, V):
            torch.testing.assert_close(X.mT @ X, torch.eye(3, dtype=torch.float64))


def test_a_basis_from_the_weights_are_their_singular_vectors():
    """A: the right ones as rows; B: the left ones as columns, where it is a basis; ΔW = 0 either way."""
    W = matrix(8, 5, 0.5).float()
    layout = Layout((Layer("one", 5, 8),), ())
    lora, core = (
        initial_factors(layout, {}, rank=2, seed=0, basis="weights", core=core, weight=lambda name: W)
        for core in (False, True)
    )
    U, S, Vh = torch.linalg.svd(W)
    A, B = core[Key("one", "A")], core[Key("one", "B")]
    torch.testing.assert_close(B * S[:2] @ A, U[:, :2] * S[:2] @ Vh[:2])
    assert torch.equal(lora[Key("one", "A")], A)
    assert not lora[Key("one", "B")].any()
    assert torch.equal(lora[Key("one", "C")], torch.eye(2))
    assert not core[Key("one", "C")].any()
