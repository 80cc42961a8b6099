"""FedSVD, FedRot-LoRA, raFLoRA and FedALT with numbers a hand can check, or against their dense definitions."""

from math import cos, sin

import pytest
import torch

from fedtri.adapters.layout import Key
from fedtri.errors import FedtriError
from fedtri.federation import client, server
from fedtri.messages import Request
from fedtri.methods import build
from fedtri.methods.raflora import slice_weights
from fedtri.state import Scales, ServerState
from replies import ALPHA, DOUBLE, drawn, product, reply, step
from tiny import clients_tensors, rounds

A, B, C, a, b = (Key("w", factor) for factor in "ABCab")


def orthonormal(seed: int, r: int = 2, d: int = 5) -> torch.Tensor:
    """r orthonormal rows."""
    return torch.linalg.qr(torch.randn(d, r, generator=torch.Generator().manual_seed(seed), **DOUBLE)).Q.mT


def test_fedsvd_is_the_svd_of_the_mean_product():
    """Against the dense SVD, over two rounds. Seen to fail with C taken for the identity in the second round."""
    frozen, state = orthonormal(0), ServerState(scales=Scales(ALPHA))
    held, core = torch.zeros(4, 2, **DOUBLE), torch.eye(2, **DOUBLE)
    for seed in (3, 5):
        replies = [reply(one.client, one.num_examples, B=(held + one.up[B]).tolist()) for one in drawn(seed)]
        mean = (held + sum(one.num_examples / 6 * one.up[B] for one in drawn(seed))) @ core @ frozen
        state = step("fedsvd", *replies, state=state)
        held, core = state.shared[B], state.shared[C]
        _, S, Vh = torch.linalg.svd(mean, full_matrices=False)
        torch.testing.assert_close(held @ core @ frozen, mean)
        torch.testing.assert_close((held.mT @ held), torch.diag(S[:2] ** 2), atol=1e-9, rtol=0)
        rows = core @ frozen
        torch.testing.assert_close(rows @ rows.mT, torch.eye(2, **DOUBLE))
        torch.testing.assert_close((rows @ Vh[:2].mT).abs(), torch.eye(2, **DOUBLE), atol=1e-9, rtol=0)


def test_fedsvd_sends_the_small_rotation_and_no_a(lab, tmp_path):
    """A client's own A has orthonormal rows, and is never overwritten; every=2 leaves C alone in the first round."""
    built = lab.federation(tmp_path / "each", method="fedsvd")
    layer = built.spec.layout.layers[0]
    before = built.site.initial(built.spec.clients[0])[Key(layer.name, "A")]
    torch.testing.assert_close(before @ before.mT, torch.eye(len(before)))
    last = list(rounds(built))[-1].state
    assert {key.factor for key in last.shared} == {"B", "C", "H"}
    assert all(torch.equal(own[Key(layer.name, "A")], before) for own in clients_tensors(built).values())
    slow = [
        one.state for one in rounds(lab.federation(tmp_path / "slow", method="fedsvd", method_options={"every": 2}))
    ]
    assert {key.factor for key in slow[0].shared} == {"B", "H"}
    assert {key.factor for key in slow[1].shared} == {"B", "C", "H"}


def turned(angle: float) -> torch.Tensor:
    """A rotation of the plane."""
    return torch.tensor([[cos(angle), -sin(angle)], [sin(angle), cos(angle)]], **DOUBLE)


@pytest.mark.parametrize("by", ["alternate", "A", "B", "both"])
def test_fedrot_lora_sees_through_a_rotation(by):
    """Clients that hold the shared update in bases of their own agree, whatever these are: the mean is that update.

    FedIT's mean of the same factors is not. Seen to fail with R where RᵀA needs Rᵀ.
    """
    first = step("fedrot_lora", drawn(seed=1)[0], by=by)
    replies = [
        reply(name, n, B=(first.shared[B] @ R).tolist(), A=(R.mT @ first.shared[A]).tolist())
        for name, n, R in (("x", 1, turned(0.7)), ("y", 2, turned(-2.0)), ("z", 3, turned(3.0)))
    ]
    for _ in range(2):  # by A in one round, by B in the other
        second = step("fedrot_lora", *replies, state=first, by=by)
        torch.testing.assert_close(product(second.shared), product(first.shared))
        torch.testing.assert_close(second.shared[A], first.shared[A])
        first = second
    assert (product(step("fedit", *replies).shared) - product(first.shared)).norm() > 0.5


def test_fedrot_lora_aligns_a_and_b_in_turn_and_never_in_the_first_round():
    replies = drawn(seed=4)
    assert torch.equal(step("fedrot_lora", *replies).shared[A], step("fedit", *replies).shared[A])
    one = step("fedrot_lora", *drawn(seed=9))
    two = step("fedrot_lora", *replies, state=one)
    assert torch.equal(two.shared[A], step("fedrot_lora", *replies, state=one, by="A").shared[A])
    three = step("fedrot_lora", *drawn(seed=8), state=two)
    assert torch.equal(three.shared[A], step("fedrot_lora", *drawn(seed=8), state=two, by="B").shared[A])


def test_fedrot_lora_turns_by_a_part_of_the_angle():
    """λ = 1/2 of a rotation by 1 is one by 1/2: the nearest rotation to (I + R) / 2."""
    first = step("fedrot_lora", drawn(seed=1)[0])
    R = turned(1.0)
    moved = reply("x", 1, B=(first.shared[B] @ R).tolist(), A=(R.mT @ first.shared[A]).tolist())
    half = step("fedrot_lora", moved, state=first, by="A", strength=0.5)
    torch.testing.assert_close(half.shared[A], turned(0.5).mT @ first.shared[A])
    torch.testing.assert_close(product(half.shared), product(first.shared))


def test_each_slice_of_raflora_is_weighed_by_those_who_have_it():
    """Ranks 1, 2 and 3, examples 1, 2 and 3: the third slice is the third client's alone."""
    found = slice_weights(torch.tensor([1, 2, 3], **DOUBLE) / 6, [1, 2, 3], 4)
    expected = [[1 / 6, 0, 0, 0], [2 / 6, 2 / 5, 0, 0], [3 / 6, 3 / 5, 1, 0]]
    torch.testing.assert_close(found, torch.tensor(expected, **DOUBLE))


def test_raflora_keeps_what_only_a_large_rank_has():
    """Two clients of rank 1 send nothing of the second direction; FlexLoRA's mean halves it, round after round."""
    small = [reply(name, 1, A=[[1, 0, 0]], B=[[1], [0]]) for name in "xy"]
    large = reply("z", 2, A=[[1, 0, 0], [0, 1, 0]], B=[[2, 0], [0, 2]])  # scale alpha / 2 where theirs is alpha
    found, flex = (step(name, *small, large).shared for name in ("raflora", "flexlora"))
    torch.testing.assert_close(product(found), torch.tensor([[2.0, 0, 0], [0, 2, 0]], **DOUBLE))
    torch.testing.assert_close(product(flex), torch.tensor([[2.0, 0, 0], [0, 1, 0]], **DOUBLE))


def test_raflora_with_one_rank_is_flexlora():
    ours, flex = (step(name, *drawn(seed=6)).shared for name in ("raflora", "flexlora"))
    torch.testing.assert_close(product(ours), product(flex))


X = reply("x", 1, A=[[3, 0, 0]], B=[[1], [0]])
Y = reply("y", 3, A=[[0, 6, 0]], B=[[0], [1]])
Z = reply("z", 1, A=[[0, 0, 9]], B=[[0], [4]])


def test_fedalt_sends_each_client_the_mean_of_the_others():
    """Seen to fail with oneself among them. A client that has sent nothing yet gets everyone's."""
    state = step("fedalt", X, Y, Z)
    assert state.personal["x"][a].tolist() == [[0, 3, 4.5]]
    assert state.personal["z"][a].tolist() == [[1.5, 3, 0]]
    assert state.personal["z"][b].tolist() == [[0.5], [0.5]]
    assert state.shared[a].tolist() == [[1, 2, 3]]
    by_examples = step("fedalt", X, Y, Z, weights="examples")
    torch.testing.assert_close(by_examples.personal["z"][a], torch.tensor([[0.75, 4.5, 0]], **DOUBLE))


def test_who_missed_a_round_of_fedalt_counts_with_what_it_last_sent():
    state = step("fedalt", X, Z)
    state = step("fedalt", Y, state=state)
    assert state.personal["y"][a].tolist() == [[1.5, 0, 4.5]]
    assert state.personal["x"][a].tolist() == [[0, 3, 4.5]]


def test_a_client_alone_is_its_own_rest_of_the_world():
    state = step("fedalt", X)
    assert state.personal["x"] == {a: X.up[A], b: X.up[B]}


def test_fedalt_mixes_its_own_adapter_and_the_rest_of_the_world(lab, tmp_path):
    """(1 − w) B A + w b a, and its own pair is never overwritten."""
    built = lab.federation(tmp_path, method="fedalt", method_options={"mix": 0.25})
    state = list(rounds(built))[-1].state
    name, layer = built.spec.clients[0], built.spec.layout.layers[0].name
    own = built.site.kept(name)
    torch.testing.assert_close(own[Key(layer, "C")], 0.75 * torch.eye(len(own[Key(layer, "C")])))
    torch.testing.assert_close(own[Key(layer, "b")], 0.25 * state.personal[name][Key(layer, "b")])
    assert torch.equal(own[Key(layer, "A")], state.own["seen"][name]["sent"][f"A:{layer}"])
    again = client.received(built.site, Request("train", 9, name, server.downlink(built.method, state, name)))
    assert torch.equal(again[Key(layer, "b")], own[Key(layer, "b")]), "what is sent twice is not mixed in twice"


@pytest.mark.parametrize(
    ("method", "option", "value"),
    [
        ("fedsvd", "every", 0),
        ("fedrot_lora", "by", "C"),
        ("fedrot_lora", "strength", 0.0),
        ("fedrot_lora", "strength", 1.5),
        ("fedalt", "mix", 1.0),
        ("fedalt", "mix", -0.1),
    ],
)
def test_options_out_of_range_are_named(method, option, value):
    with pytest.raises(FedtriError, match=f"method_options.{option}: expected"):
        build(method, {option: value})
