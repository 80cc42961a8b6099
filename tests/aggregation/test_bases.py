"""A pooled basis is the SVD of the clients' mean gradient, as far as what they sent says it."""

import pytest
import torch

from fedtri.adapters.layout import Key
from fedtri.adapters.subspace import leading
from fedtri.aggregation import bases
from fedtri.messages import Reply

AB = frozenset("AB")


def gradients(m: int = 3, d_out: int = 5, d_in: int = 4, seed: int = 0) -> list[torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return [torch.randn(d_out, d_in, generator=rng, dtype=torch.float64) for _ in range(m)]


def reply(client: str, examples: int, count: int, **layers: torch.Tensor) -> Reply:
    up = {}
    for name, gradient in layers.items():
        U, S, V = leading(gradient, count, torch.Generator().manual_seed(0))
        up |= {Key(name, "B"): U * S.sqrt(), Key(name, "A"): (V * S.sqrt()).mT}
    return Reply(client, 0, up, examples, {})


def same_space(one: torch.Tensor, other: torch.Tensor) -> None:
    """Whether the columns span one space: the projections onto them are one."""
    torch.testing.assert_close(one @ one.mT, other @ other.mT)


def test_by_hand():
    """Two clients of 1 and 3 examples with G = 4·e₁e₂ᵀ and G = 2·e₂e₁ᵀ: the mean is e₁e₂ᵀ + 1.5·e₂e₁ᵀ, so the second
    client's direction comes first. Seen to fail with all clients weighing alike: 2 against 1."""
    one, two = torch.zeros(3, 2, dtype=torch.float64), torch.zeros(3, 2, dtype=torch.float64)
    one[0, 1], two[1, 0] = 4.0, 2.0
    found = bases.pooled([reply("a", 1, 1, w=one), reply("b", 3, 1, w=two)], AB, 1)
    torch.testing.assert_close(found[Key("w", "A")].abs(), torch.tensor([[1.0, 0]], dtype=torch.float64))
    torch.testing.assert_close(found[Key("w", "B")].abs(), torch.tensor([[0.0], [1], [0]], dtype=torch.float64))


def test_it_is_the_svd_of_the_mean_of_the_dense_gradients_where_sketches_are_exact():
    """Layers of two shapes, clients of unlike sizes. Seen to fail with all clients weighing alike."""
    first, second = gradients(), gradients(d_out=4, d_in=6, seed=1)
    sizes = [2, 5, 3]
    said = [reply(c, n, 4, w=G, v=H) for c, n, G, H in zip("abc", sizes, first, second, strict=True)]
    found = bases.pooled(said, AB, 2)
    for name, clients in (("w", first), ("v", second)):
        mean = sum(n / 10 * G for n, G in zip(sizes, clients, strict=True))
        assert isinstance(mean, torch.Tensor)
        U, _, Vh = torch.linalg.svd(mean)
        same_space(found[Key(name, "A")].mT, Vh[:2].mT)
        same_space(found[Key(name, "B")], U[:, :2])
    assert set(bases.pooled(said, frozenset("A"), 2)) == {Key("w", "A"), Key("v", "A")}


@pytest.mark.parametrize("counts", [(1, 1, 1), (1, 2, 3)])
def test_there_are_always_as_many_vectors_as_the_rank(counts):
    """However few factors were sent, and of however many kinds: no row is zero. Seen to fail without the zeros that
    stand in for factors that were not sent."""
    said = [reply(c, 1, n, w=G) for c, n, G in zip("abc", counts, gradients(), strict=True)][:2]
    found = bases.pooled(said, AB, 4)
    for X in (found[Key("w", "A")].mT, found[Key("w", "B")]):
        torch.testing.assert_close(X.mT @ X, torch.eye(4, dtype=torch.float64))
