"""Every function of linalg against its dense definition: float64, d_in ≠ d_out, several layers at once."""

from functools import partial
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from fedtri.aggregation import products
from fedtri.errors import FedtriError

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


@pytest.fixture(params=CASES)
def clients(request: pytest.FixtureRequest) -> Clients:
    return CASES[request.param]()


def dense_mean(B: Tensor, A: Tensor, weights: Tensor) -> Tensor:
    return torch.einsum("k,lkor,lkri->loi", weights, B, A)


def fedavg(B: Tensor, A: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    return torch.einsum("k,lkor->lor", weights, B), torch.einsum("k,lkri->lri", weights, A)


def error(clients: Clients, B_hat: Tensor, A_hat: Tensor) -> Tensor:
    return torch.linalg.matrix_norm(dense_mean(*clients) - B_hat @ A_hat)


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def test_stack_is_the_weighted_sum(clients: Clients):
    left, right = products.stacked(*clients)
    assert_close(left @ right, dense_mean(*clients))


def test_gram_blocks_are_the_definition(clients: Clients):
    B, A, _ = clients
    GB, GA = products.gram_blocks(B, A)
    for u in range(B.shape[1]):
        for v in range(B.shape[1]):
            assert_close(GB[:, u, v], B[:, u].mT @ B[:, v])
            assert_close(GA[:, u, v], A[:, u] @ A[:, v].mT)


def test_norms_and_cosines_are_the_dense_ones(clients: Clients):
    B, A, _ = clients
    products = B @ A
    assert_close(products.product_norm(B, A), torch.linalg.matrix_norm(products))
    B_hat, A_hat = fedavg(*clients)
    expected = torch.nn.functional.cosine_similarity(products[:, 0].flatten(1), (B_hat @ A_hat).flatten(1), dim=-1)
    assert_close(products.product_cosine(B[:, 0], A[:, 0], B_hat, A_hat), expected)


def test_norm_and_cosine_by_hand():
    # BA = [[3, 0], [0, 0]] and [[1, 1], [0, 0]]: norms 3 and √2, cosine 3 / (3√2)
    B1, A1 = torch.tensor([[3.0], [0.0]]), torch.tensor([[1.0, 0.0]])
    B2, A2 = torch.tensor([[1.0], [0.0]]), torch.tensor([[1.0, 1.0]])
    assert products.product_norm(B1, A1).item() == 3
    assert products.product_cosine(B1, A1, B2, A2).item() == pytest.approx(0.5**0.5)
    assert products.product_cosine(B1, A1, 0 * B2, A2).item() == 0


@pytest.mark.parametrize("rank", [1, 2, 3, 30])
def test_best_low_rank_is_the_truncated_svd(clients: Clients, rank: int):
    U, S, Vh = torch.linalg.svd(dense_mean(*clients), full_matrices=False)
    expected = (U[..., :rank] * S[:, None, :rank]) @ Vh[:, :rank]
    for split in ("balanced", "left"):
        B_hat, A_hat = products.best_low_rank(*clients, rank, split=split)
        assert B_hat.shape[-1] == A_hat.shape[-2] == rank
        assert_close(B_hat @ A_hat, expected)
    spectrum = products.product_svd(*clients, rank)[1]
    assert_close(spectrum, S[:, : spectrum.shape[-1]])
    assert (S[:, spectrum.shape[-1] :] < 1e-10).all()


def test_split_of_the_singular_values():
    clients = draw(3, 2)
    B_hat, A_hat = products.best_low_rank(*clients, 2)
    assert_close(B_hat.mT @ B_hat, A_hat @ A_hat.mT)
    A_left = products.best_low_rank(*clients, 2, split="left")[1]
    assert_close(A_left @ A_left.mT, torch.eye(2, dtype=torch.float64).expand(LAYERS, 2, 2))


def test_rank_below_one_is_refused():
    with pytest.raises(FedtriError, match="rank: expected at least 1, got 0"):
        products.best_low_rank(*draw(2, 2), 0)


def test_truncated_by_hand():
    # BA = diag(4, 1): the best rank 1 is diag(4, 0), split as 2 · 2
    B, A = torch.diag(torch.tensor([4.0, 1.0]))[None], torch.eye(2)[None]
    B_hat, A_hat = products.truncated(B, A, 1)
    assert_close(B_hat @ A_hat, torch.tensor([[[4.0, 0.0], [0.0, 0.0]]]), 1e-6)
    assert torch.linalg.vector_norm(B_hat).item() == pytest.approx(2)
    B_hat, A_hat = products.truncated(B, A, 5)
    assert B_hat.shape == (1, 2, 5)
    assert_close(B_hat @ A_hat, B @ A, 1e-6)


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


def test_normal_matrix_is_the_hessian():
    B, A, _ = draw(3, 2)
    GB, GA = products.gram_blocks(B, A)
    p = torch.tensor([0.2, -0.5, 1.1], dtype=torch.float64)
    N = products.normal_matrix(GB, GA, p.expand(LAYERS, -1))
    for layer in range(LAYERS):
        A_hat = torch.einsum("k,kri->ri", p, A[layer])
        hessian = torch.autograd.functional.hessian(
            lambda q, B=B[layer], A_hat=A_hat: (torch.einsum("k,kor->or", q, B) @ A_hat).square().sum(), p
        )
        assert isinstance(hessian, Tensor)
        assert_close(2 * N[layer], hessian)


def test_nearest_average_decreases_from_fedavg_on(clients: Clients):
    errors = [error(clients, *fedavg(*clients))]
    errors += [error(clients, *products.nearest_average(*clients, sweeps=n)[:2]) for n in (1, 2, 3, 5, 10, 30, 100)]
    for before, after in pairwise(errors):
        assert (after <= before + 1e-12).all()


def test_nearest_average_is_what_it_says(clients: Clients):
    B, A, _ = clients
    B_hat, A_hat, p, q = products.nearest_average(*clients)
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
    ours = error(clients, *products.nearest_average(*clients, sweeps=1000, tolerance=1e-14)[:2]).square().sum()
    assert ours <= loss() * (1 + 1e-6)


def test_nearest_average_leaves_identical_clients_alone():
    clients = CASES["identical clients"]()
    B_hat, A_hat, _, _ = products.nearest_average(*clients)
    assert_close(B_hat @ A_hat, clients[0][:, 0] @ clients[1][:, 0])


def test_nearest_average_by_hand():
    # 1 × 1 factors: B = (1, 3), A = (1, 3): mean product 5, FedAvg 2 · 2 = 4, and p, q can reach 5 exactly
    B = A = torch.tensor([1.0, 3.0], dtype=torch.float64).view(1, 2, 1, 1)
    B_hat, A_hat, _, _ = products.nearest_average(B, A, torch.tensor([0.5, 0.5]))
    assert (B_hat * A_hat).item() == pytest.approx(5)


def test_a_layer_does_not_depend_on_its_batch():
    B, A, weights = draw(4, 2)
    together, alone = products.nearest_average(B, A, weights), products.nearest_average(B[1:2], A[1:2], weights)
    for both, one in zip(together, alone, strict=True):
        assert_close(both[1:2], one)


def test_best_rank_is_nearest_then_flora_na_then_fedit(clients: Clients):
    rank = clients[0].shape[-1]
    best = products.residual(*clients, *products.best_low_rank(*clients, rank))
    nearest = products.residual(*clients, *products.nearest_average(*clients)[:2])
    fedit = products.residual(*clients, *fedavg(*clients))
    assert (best <= nearest + 1e-12).all()
    assert (nearest <= fedit + 1e-12).all()


def test_padding_changes_nothing():
    B, A, weights = draw(3, 2)
    wide = torch.nn.functional.pad(B, (0, 3)), torch.nn.functional.pad(A, (0, 0, 0, 3)), weights
    for solve in (partial(products.best_low_rank, rank=2), products.nearest_average):
        (B1, A1), (B2, A2) = solve(B, A, weights)[:2], solve(*wide)[:2]
        assert_close(B1 @ A1, B2 @ A2, 1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision_comes_back_as_it_went_in(dtype: torch.dtype):
    B, A, weights = (x.to(dtype) for x in draw(3, 2))
    for B_hat, A_hat in (products.best_low_rank(B, A, weights, 2), products.nearest_average(B, A, weights)[:2]):
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


def fair_objective(clients: Clients, lam: float, delta: Tensor) -> Tensor:
    B_bar, A_bar = fedavg(*clients)
    product = ((B_bar + delta) @ A_bar).flatten(1)
    cosine = torch.nn.functional.cosine_similarity(dense_mean(*clients).flatten(1), product, dim=-1)
    return 1 - cosine + lam * torch.linalg.matrix_norm(delta)


@pytest.mark.parametrize("lam", [0.001, 0.01, 0.05])
def test_lora_fair_is_stationary_and_as_good_as_descent(lam: float):
    clients = draw(3, 2, seed=5)
    ours = products.lora_fair_correction(*fedavg(*clients), *clients, lam)
    leaf = ours.clone().requires_grad_()
    fair_objective(clients, lam, leaf).sum().backward()
    assert leaf.grad is not None
    assert torch.linalg.vector_norm(leaf.grad) < 1e-6
    descent = (0.01 * torch.ones_like(ours)).requires_grad_()
    optimiser = torch.optim.LBFGS([descent], max_iter=1000, tolerance_change=0, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimiser.zero_grad()
        value = fair_objective(clients, lam, descent).sum()
        value.backward()
        return value

    optimiser.step(loss)  # pyright: ignore[reportArgumentType]
    assert fair_objective(clients, lam, ours).sum() <= loss() + 1e-9


def test_lora_fair_is_never_worse_than_fedavg(clients: Clients):
    ours = products.lora_fair_correction(*fedavg(*clients), *clients, 0.01)
    assert ours.isfinite().all()
    assert (fair_objective(clients, 0.01, ours) <= fair_objective(clients, 0.01, 0 * ours) + 1e-12).all()


def test_lora_fair_by_hand():
    # B = (2, 0) and (0, 2), A = 1 and 3: M = (1, 3), B̄ = (1, 1), Ā = 2. At λ = 0 the best cosine is 1, at
    # the projection (0.4, 1.2) of B̄ on M. The cosine's slope at B̄ is sin∠(B̄, M) / ‖B̄‖ = √0.1: from that
    # λ on, ΔB = 0.
    B = torch.tensor([[2.0, 0], [0, 2.0]], dtype=torch.float64).view(1, 2, 2, 1)
    A = torch.tensor([1.0, 3.0], dtype=torch.float64).view(1, 2, 1, 1)
    clients = B, A, torch.tensor([0.5, 0.5], dtype=torch.float64)
    at = {lam: products.lora_fair_correction(*fedavg(*clients), *clients, lam).flatten() for lam in (0.0, 0.31, 0.32)}
    assert_close(at[0.0], torch.tensor([-0.6, 0.2], dtype=torch.float64), 1e-7)
    assert torch.linalg.vector_norm(at[0.31]) > 1e-3
    assert at[0.32].tolist() == [0, 0]


def test_lora_fair_without_regularisation_reaches_the_best_cosine():
    clients = draw(3, 2)
    A_bar = fedavg(*clients)[1]
    mean = dense_mean(*clients)
    reachable = mean @ torch.linalg.pinv(A_bar) @ A_bar
    best = 1 - torch.linalg.matrix_norm(reachable) / torch.linalg.matrix_norm(mean)
    ours = products.lora_fair_correction(*fedavg(*clients), *clients, 0.0)
    assert_close(fair_objective(clients, 0.0, ours), best)
