"""Mixing is orthogonal, of any length, and lets coarse numbers keep what one large number would round away."""

import pytest
import torch

from fedtri.communication.mixing import mixed, unmixed
from fedtri.communication.numbers import MIXED, NUMBERS


def drawn(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("n", [0, 1, 2, 3, 64, 300, 4095, 4096, 6144, 9000])
def test_it_can_be_undone_and_keeps_lengths(n):
    """Seen to fail with half of a factor 1/√block."""
    x = drawn(n)
    torch.testing.assert_close(unmixed(mixed(x)), x, rtol=0, atol=1e-5)
    torch.testing.assert_close(mixed(x).norm(), x.norm())
    assert n < 64 or not torch.allclose(mixed(x), x)


def test_four_numbers_by_hand():
    """With the signs undone: rows of the 4 x 4 Walsh–Hadamard matrix, halved."""
    H = torch.tensor([[1.0, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]) / 2
    x = torch.tensor([1.0, 2, 3, 5])
    signs = unmixed(H @ torch.ones(4))  # H ones = (2, 0, 0, 0), whose transform is ones
    torch.testing.assert_close(mixed(x), H @ (signs * x))
    assert set(signs.abs().tolist()) == {1.0}


@pytest.mark.parametrize(("name", "most"), [("int8", 0.001), ("int4", 0.02), ("sign", 0.4)])
def test_a_few_large_numbers_no_longer_spoil_the_rest(name, most):
    """The squared error of a tensor with one number of 100 among 4,096 that are about 1, relative to the 4,095."""
    x = drawn(4096)
    x[7] = 100.0
    plain, after = ((kind.rounded(x) - x).square().sum() / x.square().sum() for kind in (NUMBERS[name], MIXED[name]))
    assert after < most
    assert name != "sign" or after < plain / 2


def test_a_tensor_that_is_not_finite_is_read_as_such():
    x = drawn(70)
    x[3] = torch.nan
    for kind in MIXED.values():
        assert kind.rounded(x).isnan().all()
