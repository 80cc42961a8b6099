"""Laws of the similarity of cores, and numbers small enough for a hand."""

import math

import numpy as np
import pytest
import torch

from fedtri.similarity.cores import core_gram, core_similarity


def test_one_client_is_like_itself():
    torch.testing.assert_close(core_similarity(torch.randn(1, 2, 3, 3), reference="init"), torch.ones(1, 1))


def test_core_similarity_is_linear_cka_under_isotropic_probes():
    """Against CKA of 400,000 centred probes; seen to fail with C Cᵀ in place of CᵀC."""
    generator = torch.Generator().manual_seed(0)
    cores = torch.randn(3, 2, 4, 4, generator=generator, dtype=torch.float64)
    probes = torch.randn(400_000, 4, generator=generator, dtype=torch.float64)

    def cka(C: torch.Tensor, D: torch.Tensor) -> float:
        y, z = ((probes @ E.T) - (probes @ E.T).mean(0) for E in (C, D))
        return float((z.T @ y).norm() ** 2 / ((y.T @ y).norm() * (z.T @ z).norm()))

    expected = torch.tensor([[np.mean([cka(C, D) for C, D in zip(a, b, strict=True)]) for b in cores] for a in cores])
    torch.testing.assert_close(core_similarity(cores, reference="raw"), expected, atol=5e-3, rtol=0)


def test_core_similarity_by_hand():
    a, b = torch.diag(torch.tensor([1.0, 0])), torch.diag(torch.tensor([1.0, 1]))
    found = core_similarity(torch.stack([a, b])[:, None], reference="raw")
    torch.testing.assert_close(found[0, 1], torch.tensor(1 / math.sqrt(2)))  # <diag(1,0), I> / (1 · √2)


def test_only_what_was_learned_tells_clients_apart():
    """The prototype's observation: raw cores near I all look alike."""
    generator = torch.Generator().manual_seed(0)
    cores = torch.eye(8) + 0.01 * torch.randn(5, 3, 8, 8, generator=generator)
    off = ~torch.eye(5, dtype=torch.bool)
    assert core_similarity(cores, reference="raw")[off].min() > 0.99
    assert core_similarity(cores, reference="init")[off].max() < 0.8


def test_the_cosine_tells_a_move_from_its_opposite():
    """CKA gives opposite moves 1, orthogonal ones 0; by cosine both have 0, and half of the way between, √½."""
    x, y = torch.zeros(2, 2), torch.zeros(2, 2)
    x[0, 1], y[1, 0] = 1, 1
    cores = torch.eye(2) + torch.stack([x, -3 * x, y, x + y])[:, None]
    cosine = core_similarity(cores, reference="init", signed=True)
    half = math.sqrt(1 / 2)
    expected = torch.tensor([[1, 0, 0, half], [0, 1, 0, 0], [0, 0, 1, half], [half, 0, half, 1]])
    torch.testing.assert_close(cosine, expected)
    assert core_similarity(cores, reference="init")[0, 1] == 1


def test_layers_that_disagree_cancel_in_the_cosine():
    """Seen to fail with negative cosines cut off layer by layer: 1 and −1 would give 1/2."""
    x = torch.diag(torch.tensor([1.0, -2]))
    cores = torch.eye(2) + torch.stack([torch.stack([x, x]), torch.stack([x, -x])])
    assert core_similarity(cores, reference="init", signed=True)[0, 1] == 0


def test_a_core_that_has_not_moved_is_like_itself_alone():
    cores = torch.eye(4).expand(3, 2, 4, 4).clone()
    cores[2] += torch.randn(2, 4, 4)
    torch.testing.assert_close(core_similarity(cores, reference="init"), torch.eye(3))
    torch.testing.assert_close(core_similarity(cores, reference="raw")[:2, :2], torch.ones(2, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nor_is_one_that_a_mixture_has_left_within_rounding_of_where_it_began(dtype):
    """Weights that sum to 1 but for rounding. Seen to fail with exact zeros alone: noise like noise, similarity 1."""
    still = torch.eye(4, dtype=dtype) * (
        1 - torch.tensor([1, 3, 0], dtype=dtype)[:, None, None] * torch.finfo(dtype).eps
    )
    learned = still + 1e-3 * torch.randn(3, 4, 4, dtype=dtype)
    cores = torch.stack([still, learned], 1)  # (clients, layers, r, r)
    alone = core_similarity(learned[:, None], reference="init").fill_diagonal_(0)
    torch.testing.assert_close(core_similarity(cores, reference="init").fill_diagonal_(0), alone / 2)


@pytest.mark.parametrize("size", [1e-7, 1e3])
def test_the_size_of_a_move_plays_no_part(size):
    """Seen to fail at 1e-7 with normalize's default eps."""
    moved = torch.randn(4, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    grams = [core_gram(scale * moved) for scale in (1, size)]
    torch.testing.assert_close(grams[1], grams[0])
