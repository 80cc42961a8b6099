"""Every function of products against its dense definition: float64, d_in ≠ d_out, several layers at once."""

import pytest
import torch
from torch import Tensor

from factored import CASES, LAYERS, Clients, assert_close, dense_mean, draw, error, fedavg
from fedtri.aggregation import products
from fedtri.errors import FedtriError


@pytest.fixture(params=CASES)
def clients(request: pytest.FixtureRequest) -> Clients:
    return CASES[request.param]()


def test_stack_is_the_weighted_sum(clients: Clients):
    left, right = products.stacked(*clients)
    assert_close(left @ right, dense_mean(*clients))


def test_norms_are_the_dense_ones(clients: Clients):
    B, A, _ = clients
    assert_close(products.product_norm(B, A), torch.linalg.matrix_norm(B @ A))


def test_norm_by_hand():
    """BA = [[3, 0], [0, 0]]."""
    assert products.product_norm(torch.tensor([[3.0], [0.0]]), torch.tensor([[1.0, 0.0]])).item() == 3


@pytest.mark.parametrize("rank", [1, 2, 3, 30])
def test_best_low_rank_is_the_truncated_svd(clients: Clients, rank: int):
    U, S, Vh = torch.linalg.svd(dense_mean(*clients), full_matrices=False)
    B_hat, A_hat = products.best_low_rank(*clients, rank)
    assert B_hat.shape[-1] == A_hat.shape[-2] == rank
    assert_close(B_hat @ A_hat, (U[..., :rank] * S[:, None, :rank]) @ Vh[:, :rank])
    assert_close(B_hat.mT @ B_hat, A_hat @ A_hat.mT)  # √σ to each
    spectrum = products.product_svd(*clients, rank)[1]
    assert_close(spectrum, S[:, : spectrum.shape[-1]])
    assert (S[:, spectrum.shape[-1] :] < 1e-10).all()


def test_beyond_the_means_own_rank_all_is_exactly_zero():
    """One client of rank 1, padded to 3. Seen to fail with the singular values of 1e-17 that rounding leaves: pairs
    of 1e-9, which a client can not tell from pairs that learn."""
    B, A, weights = draw(1, 3, ranks=[1])
    B_hat, A_hat = products.best_low_rank(B, A, weights, 3)
    assert not B_hat[:, :, 1:].any()
    assert not A_hat[:, 1:].any()
    assert_close(B_hat @ A_hat, B[:, 0] @ A[:, 0])


def test_rank_below_one_is_refused():
    with pytest.raises(FedtriError, match="rank: expected at least 1, got 0"):
        products.best_low_rank(*draw(2, 2), 0)


def test_best_low_rank_by_hand():
    """BA = diag(4, 1): the best rank 1 is diag(4, 0), split as 2 · 2."""
    B, A = torch.diag(torch.tensor([4.0, 1.0]))[None, None], torch.eye(2)[None, None]
    B_hat, A_hat = products.best_low_rank(B, A, torch.ones(1), 1)
    assert_close(B_hat @ A_hat, torch.tensor([[[4.0, 0.0], [0.0, 0.0]]]), 1e-6)
    assert torch.linalg.vector_norm(B_hat).item() == pytest.approx(2)


def test_residual_is_the_dense_one(clients: Clients):
    mean = dense_mean(*clients)
    norm = torch.linalg.matrix_norm(mean)
    B_hat, A_hat = fedavg(*clients)
    expected = torch.where(norm > 0, error(clients, B_hat, A_hat) / norm, 0.0)
    assert_close(products.residual(*clients, B_hat, A_hat), expected)
    left, right = products.stacked(*clients)
    assert (products.residual(*clients, left, right) < 1e-14).all()


def test_residual_sees_what_the_gram_form_cannot():
    B, A, weights = draw(3, 2)
    left, right = products.stacked(B, A, weights)
    assert_close(
        products.residual(B, A, weights, left * (1 + 1e-12), right),
        torch.full((LAYERS,), 1e-12, dtype=torch.float64),
        1e-14,
    )


def test_residual_of_a_zero_mean():
    B, A, weights = draw(2, 2)
    zero = torch.zeros_like(B)
    assert products.residual(zero, A, weights, zero[:, 0], A[:, 0]).tolist() == [0, 0, 0]
    assert products.residual(zero, A, weights, B[:, 0], A[:, 0]).isinf().all()


def test_padding_changes_nothing():
    B, A, weights = draw(3, 2)
    wide = torch.nn.functional.pad(B, (0, 3)), torch.nn.functional.pad(A, (0, 0, 0, 3)), weights
    (B1, A1), (B2, A2) = products.best_low_rank(B, A, weights, 2), products.best_low_rank(*wide, 2)
    assert_close(B1 @ A1, B2 @ A2, 1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision_comes_back_as_it_went_in(dtype: torch.dtype):
    B, A, weights = (x.to(dtype) for x in draw(3, 2))
    B_hat, A_hat = products.best_low_rank(B, A, weights, 2)
    assert B_hat.dtype == A_hat.dtype == dtype
    assert (products.residual(B, A, weights, B_hat, A_hat) < 1).all()


def test_alignment_undoes_a_rotation():
    B, A = (x[:, 0] for x in draw(1, 3)[:2])
    R = torch.linalg.qr(torch.randn(LAYERS, 3, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64))[0]
    B_back, A_back = products.procrustes_align(B @ R, R.mT @ A, B, A)
    assert_close(B_back, B)
    assert_close(A_back, A)


def test_alignment_keeps_the_product_and_beats_other_rotations():
    (B, A), (B0, A0) = ((x[:, 0] for x in draw(1, 3, seed=seed)[:2]) for seed in (0, 1))
    B1, A1 = products.procrustes_align(B, A, B0, A0)
    assert_close(B1 @ A1, B @ A)

    def distance(R: Tensor) -> Tensor:
        return (B1 @ R - B0).square().sum((1, 2)) + (R.mT @ A1 - A0).square().sum((1, 2))

    here = distance(torch.eye(3, dtype=torch.float64).expand(LAYERS, 3, 3))
    for seed in range(20):
        step = torch.randn(LAYERS, 3, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        assert (distance(torch.linalg.matrix_exp(0.1 * (step - step.mT))) >= here).all()
