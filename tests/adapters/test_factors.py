"""Laws of what a client's factors start from, and of what they stand for."""

import pytest
import torch

from fedtri.adapters.factors import block_diagonal, core_of, effective_update, folded
from fedtri.adapters.initial import initial_factors
from fedtri.adapters.layout import Key, Layer, Layout
from tiny import assert_same

LAYOUT = Layout((Layer("up", 5, 8), Layer("down", 8, 4)), ())


def test_initial_factors_come_from_the_seed_alone():
    one, again, other = (initial_factors(LAYOUT, {}, rank=3, seed=seed) for seed in (0, 0, 1))
    assert_same(one, again)
    for name in ("up", "down"):
        assert not torch.equal(one[Key(name, "A")], other[Key(name, "A")])
        assert torch.equal(one[Key(name, "C")], torch.eye(3))
        assert not one[Key(name, "B")].any()


@pytest.mark.parametrize("basis", ["kaiming", "orthonormal"])
def test_the_rows_of_a_smaller_rank_are_the_first_of_a_larger_one(basis):
    """Seen to fail in the orthonormal basis, where columns were drawn row by row."""
    small, large = (initial_factors(LAYOUT, {}, rank=rank, seed=0, basis=basis, core=True) for rank in (2, 4))
    for name in ("up", "down"):
        torch.testing.assert_close(small[Key(name, "A")], large[Key(name, "A")][:2])
        torch.testing.assert_close(small[Key(name, "B")], large[Key(name, "B")][:, :2])


def test_the_orthonormal_basis_is_orthonormal():
    own = initial_factors(LAYOUT, {}, rank=4, seed=0, basis="orthonormal", core=True)
    for name in ("up", "down"):
        A, B, C = (own[Key(name, factor)] for factor in "ABC")
        torch.testing.assert_close(A @ A.mT, torch.eye(4))
        torch.testing.assert_close(B.mT @ B, torch.eye(4))
        assert not C.any()


def test_a_second_adapter_starts_at_nothing_and_can_learn():
    """b = 0 beside an a that is not, and that is not the first adapter's A. Seen to fail with one draw for both."""
    own = initial_factors(Layout(LAYOUT.layers, (), extra="ab"), {}, rank=3, seed=0)
    for name in ("up", "down"):
        assert own[Key(name, "a")].all()
        assert not torch.equal(own[Key(name, "a")], own[Key(name, "A")])
        assert not own[Key(name, "b")].any()


def test_effective_update_by_hand():
    A, C, B = torch.tensor([[1.0, 2, 0]]), torch.tensor([[3.0]]), torch.tensor([[1.0], [-1]])
    own = {Key("l", "A"): A, Key("l", "C"): C, Key("l", "B"): B}
    expected = torch.tensor([[6.0, 12, 0], [-6, -12, 0]])
    torch.testing.assert_close(effective_update(own, "l", 2.0), expected)
    second = {Key("l", "a"): torch.tensor([[0.0, 0, 1]]), Key("l", "b"): torch.tensor([[5.0], [0]])}
    torch.testing.assert_close(
        effective_update({**own, **second}, "l", 2.0), expected + torch.tensor([[0, 0, 10], [0, 0, 0]])
    )


def test_blocks_stand_on_the_diagonal_with_their_scalars():
    blocks = torch.tensor([[1.0, 2], [3, 4], [5, 6], [7, 8]])
    square = torch.tensor([[1.0, 2, 0, 0], [3, 4, 0, 0], [0, 0, 5, 6], [0, 0, 7, 8]])
    assert torch.equal(block_diagonal(blocks), square)
    own = {Key("l", "C"): blocks, Key("l", "S"): torch.tensor([1.0, 10])}
    square[2:] *= 10
    assert torch.equal(core_of(own, "l"), square)
    assert torch.equal(folded(own)[Key("l", "S")], torch.ones(2))
    assert torch.equal(core_of(folded(own), "l"), square)


def test_the_order_on_the_wire_is_stable():
    """Factor by factor, in the model's order."""
    layout = Layout(LAYOUT.layers, (("head.weight", (3, 4)),), extra="Wab")
    kinds = frozenset("HbaWBCA")
    assert [key.factor for key in layout.keys(kinds)] == [*"AACCBBWWaabb", "H"]
    assert layout.shapes(2)[Key("up", "a")] == (2, 5)
    assert layout.shapes(2)[Key("up", "b")] == (8, 2)
