"""FLoRA-NA's alternating solves: downhill from FedAvg, as good as any descent, and numbers small enough for a hand."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from factored import CASES, LAYERS, Clients, assert_close, dense_mean, draw, error, fedavg
from fedtri.aggregation import products
from fedtri.methods.flora_na import gram_blocks, nearest_average, normal_matrix


@pytest.fixture(params=CASES)
def clients(request: pytest.FixtureRequest) -> Clients:
    return CASES[request.param]()


def test_gram_blocks_are_the_definition(clients: Clients):
    B, A, _ = clients
    GB, GA = gram_blocks(B, A)
    for u in range(B.shape[1]):
        for v in range(B.shape[1]):
            assert_close(GB[:, u, v], B[:, u].mT @ B[:, v])
            assert_close(GA[:, u, v], A[:, u] @ A[:, v].mT)


def test_normal_matrix_is_the_hessian():
    B, A, _ = draw(3, 2)
    GB, GA = gram_blocks(B, A)
    p = torch.tensor([0.2, -0.5, 1.1], dtype=torch.float64)
    N = normal_matrix(GB, GA, p.expand(LAYERS, -1))
    for layer in range(LAYERS):
        A_hat = torch.einsum("k,kri->ri", p, A[layer])
        hessian = torch.autograd.functional.hessian(
            lambda q, B=B[layer], A_hat=A_hat: (torch.einsum("k,kor->or", q, B) @ A_hat).square().sum(), p
        )
        assert isinstance(hessian, Tensor)
        assert_close(2 * N[layer], hessian)


def test_nearest_average_decreases_from_fedavg_on(clients: Clients):
    errors = [error(clients, *fedavg(*clients))]
    errors += [error(clients, *nearest_average(*clients, sweeps=n)[:2]) for n in (1, 2, 3, 5, 10, 30, 100)]
    for before, after in pairwise(errors):
        assert (after <= before + 1e-12).all()


def test_nearest_average_is_what_it_says(clients: Clients):
    B, A, _ = clients
    B_hat, A_hat, p, q = nearest_average(*clients)
    assert_close(B_hat, torch.einsum("lk,lkor->lor", q, B))
    assert_close(A_hat, torch.einsum("lk,lkri->lri", p, A))


def test_nearest_average_is_as_good_as_descent():
    clients = draw(4, 2, seed=3)
    B, A, weights = clients
    p, q = (weights.expand(LAYERS, -1).clone().requires_grad_() for _ in range(2))
    optimiser = torch.optim.LBFGS(
        [p, q], max_iter=2000, tolerance_grad=1e-12, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        optimiser.zero_grad()
        fit = torch.einsum("lk,lkor->lor", q, B) @ torch.einsum("lk,lkri->lri", p, A)
        value = (dense_mean(*clients) - fit).square().sum()
        value.backward()
        return value

    optimiser.step(loss)  # pyright: ignore[reportArgumentType]
    ours = error(clients, *nearest_average(*clients, sweeps=1000, tolerance=1e-14)[:2]).square().sum()
    assert ours <= loss() * (1 + 1e-6)


def test_nearest_average_leaves_identical_clients_alone():
    clients = CASES["identical clients"]()
    B_hat, A_hat, _, _ = nearest_average(*clients)
    assert_close(B_hat @ A_hat, clients[0][:, 0] @ clients[1][:, 0])


def test_nearest_average_by_hand():
    # 1 × 1 factors: B = (1, 3), A = (1, 3): mean product 5, FedAvg 2 · 2 = 4, and p, q can reach 5 exactly
    B = A = torch.tensor([1.0, 3.0], dtype=torch.float64).view(1, 2, 1, 1)
    B_hat, A_hat, _, _ = nearest_average(B, A, torch.tensor([0.5, 0.5]))
    assert (B_hat * A_hat).item() == pytest.approx(5)


def test_a_layer_does_not_depend_on_its_batch():
    B, A, weights = draw(4, 2)
    together, alone = nearest_average(B, A, weights), nearest_average(B[1:2], A[1:2], weights)
    for both, one in zip(together, alone, strict=True):
        assert_close(both[1:2], one)


def test_best_rank_is_nearest_then_flora_na_then_fedit(clients: Clients):
    rank = clients[0].shape[-1]
    best = products.residual(*clients, *products.best_low_rank(*clients, rank))
    nearest = products.residual(*clients, *nearest_average(*clients)[:2])
    fedit = products.residual(*clients, *fedavg(*clients))
    assert (best <= nearest + 1e-12).all()
    assert (nearest <= fedit + 1e-12).all()


def test_padding_changes_nothing():
    B, A, weights = draw(3, 2)
    wide = torch.nn.functional.pad(B, (0, 3)), torch.nn.functional.pad(A, (0, 0, 0, 3)), weights
    (B1, A1), (B2, A2) = nearest_average(B, A, weights)[:2], nearest_average(*wide)[:2]
    assert_close(B1 @ A1, B2 @ A2, 1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision_comes_back_as_it_went_in(dtype: torch.dtype):
    B, A, weights = (x.to(dtype) for x in draw(3, 2))
    B_hat, A_hat = nearest_average(B, A, weights)[:2]
    assert B_hat.dtype == A_hat.dtype == dtype
    assert (products.residual(B, A, weights, B_hat, A_hat) < 1).all()


def test_factors_that_are_nearly_equal_are_told_apart():
    """B = 0 and b, A = (1, 0) and (1, ε): M = ½ b (1, ε), which p ∝ (0, 1) reaches exactly.

    Seen to fail with RIDGE = 1e-3: p does not leave (½, ½), and Â points to (1, ε / 2).
    """
    epsilon = 1e-3
    B = torch.tensor([[0.0], [1.0]], dtype=torch.float64).view(1, 2, 1, 1).expand(1, 2, 3, 1)
    A = torch.tensor([[1.0, 0.0], [1.0, epsilon]], dtype=torch.float64).view(1, 2, 1, 2)
    weights = torch.tensor([0.5, 0.5])
    B_hat, A_hat = nearest_average(B, A, weights)[:2]
    assert float(A_hat[0, 0, 1] / A_hat[0, 0, 0]) == pytest.approx(epsilon, rel=1e-4)
    assert products.residual(B, A, weights, B_hat, A_hat).item() < 1e-7


def test_rounding_in_what_clients_send_stays_rounding():
    """240 layers in which the clients' A differ by 1e-3 and 1e-5. Seen to fail with a stop by the objective's relative
    decrease of 1e-8: where rounding decides on one sweep more or less, Â moves by 1e-8 and more of its norm."""
    generator = torch.Generator().manual_seed(0)
    draws = [torch.randn(240, m, *shape, generator=generator, dtype=torch.float64) for m, shape in SHAPES]
    moves = 1e-3 * torch.tensor([1, 1, 1e-2, 1e-2], dtype=torch.float64)[:, None, None]
    B, A = draws[0], draws[1] + moves * draws[2]
    weights = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    found = nearest_average(B, A, weights)[1]
    again = nearest_average(B * (1 + 1e-15 * draws[3]), A * (1 + 1e-15 * draws[4]), weights)[1]
    assert ((found - again).norm(dim=(1, 2)) < 1e-9 * found.norm(dim=(1, 2))).all()


SHAPES = [(4, (12, 4)), (1, (4, 12)), (4, (4, 12)), (4, (12, 4)), (4, (4, 12))]
