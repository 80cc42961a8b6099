"""LoRA-FAIR's correction: a stationary point as good as any descent finds, and numbers small enough for a hand."""

import pytest
import torch
from torch import Tensor

from factored import CASES, Clients, assert_close, dense_mean, draw, fedavg
from fedtri.methods.lora_fair import correction


@pytest.fixture(params=CASES)
def clients(request: pytest.FixtureRequest) -> Clients:
    return CASES[request.param]()


def fair_objective(clients: Clients, lam: float, delta: Tensor) -> Tensor:
    B_bar, A_bar = fedavg(*clients)
    product = ((B_bar + delta) @ A_bar).flatten(1)
    cosine = torch.nn.functional.cosine_similarity(dense_mean(*clients).flatten(1), product, dim=-1)
    return 1 - cosine + lam * torch.linalg.matrix_norm(delta)


@pytest.mark.parametrize("lam", [0.001, 0.01, 0.05])
def test_lora_fair_is_stationary_and_as_good_as_descent(lam: float):
    clients = draw(3, 2, seed=5)
    ours = correction(*fedavg(*clients), *clients, lam)
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
    ours = correction(*fedavg(*clients), *clients, 0.01)
    assert ours.isfinite().all()
    assert (fair_objective(clients, 0.01, ours) <= fair_objective(clients, 0.01, 0 * ours) + 1e-12).all()


def test_lora_fair_by_hand():
    # B = (2, 0) and (0, 2), A = 1 and 3: M = (1, 3), B̄ = (1, 1), Ā = 2. At λ = 0 the best cosine is 1, at
    # the projection (0.4, 1.2) of B̄ on M. The cosine's slope at B̄ is sin∠(B̄, M) / ‖B̄‖ = √0.1: from that
    # λ on, ΔB = 0.
    B = torch.tensor([[2.0, 0], [0, 2.0]], dtype=torch.float64).view(1, 2, 2, 1)
    A = torch.tensor([1.0, 3.0], dtype=torch.float64).view(1, 2, 1, 1)
    clients = B, A, torch.tensor([0.5, 0.5], dtype=torch.float64)
    at = {lam: correction(*fedavg(*clients), *clients, lam).flatten() for lam in (0.0, 0.31, 0.32)}
    assert_close(at[0.0], torch.tensor([-0.6, 0.2], dtype=torch.float64), 1e-7)
    assert torch.linalg.vector_norm(at[0.31]) > 1e-3
    assert at[0.32].tolist() == [0, 0]


def test_lora_fair_without_regularisation_reaches_the_best_cosine():
    clients = draw(3, 2)
    A_bar = fedavg(*clients)[1]
    mean = dense_mean(*clients)
    reachable = mean @ torch.linalg.pinv(A_bar) @ A_bar
    best = 1 - torch.linalg.matrix_norm(reachable) / torch.linalg.matrix_norm(mean)
    ours = correction(*fedavg(*clients), *clients, 0.0)
    assert_close(fair_objective(clients, 0.0, ours), best)
