"""From a name to a method: heads, and what the table of methods promises of all of them."""

import re

import pytest
import torch

from fedtri import methods
from fedtri.adapters.layout import FACTORS, Key
from fedtri.errors import FedtriError
from fedtri.federation import server
from fedtri.messages import Reply
from fedtri.methods import METHODS
from fedtri.state import ServerState
from replies import drawn, reply, step


def test_an_unknown_method_is_named():
    with pytest.raises(FedtriError, match="method: unknown method 'fedavg'"):
        methods.build("fedavg")


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("head", ["default", "personal", "shared"])
def test_the_head_policy_touches_the_head_alone(name, head):
    """H learns everywhere, and travels both ways or not at all."""
    own, method = METHODS[name]().plan, methods.build(name, head=head)
    for round in range(4):
        plan = method.plan(round)
        assert "H" in plan.train
        assert ("H" in plan.up) == ("H" in plan.down)
        if head != "default":
            assert ("H" in plan.up) == (head == "shared")
        for kinds, before in ((plan.train, own(round).train), (plan.up, own(round).up), (plan.down, own(round).down)):
            assert kinds - {"H"} == before - {"H"}
            assert kinds <= set(FACTORS)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_says_what_it_is(name):
    method = METHODS[name]()
    assert method.name == name
    assert method.paper.name
    assert bool(method.paper.link) == bool(method.paper.year) == bool(method.paper.title)
    assert method.paper.link in ("", *re.findall(r"^https://arxiv\.org/abs/\d{4}\.\d{5}$", method.paper.link))
    assert method.plan(0).up <= method.plan(0).train


def test_weights_are_each_paper_s_own_and_can_be_overridden():
    """Of 1 and 3 examples: (1·1 + 3·5) / 4 or (1 + 5) / 2; the head and every method alike, in one place."""
    uniform = {name for name in METHODS if METHODS[name]().weights == "uniform"}
    assert uniform == {"fed_sb", "ravan", "fedex_lora", "flora_na", "fedalt"}
    one, two = (reply(name, n, B=[[value]], A=[[value]]) for name, n, value in (("x", 1, 1.0), ("y", 3, 5.0)))
    for weights, expected in (("examples", 4.0), ("uniform", 3.0)):
        assert step("fedit", one, two, weights=weights).shared[Key("w", "A")].item() == expected
        heads = [Reply(r.client, 0, {Key("h", "H"): r.up[Key("w", "A")]}, r.num_examples, {}) for r in (one, two)]
        method = methods.build("fed_sb", weights=weights)
        up = [Reply(h.client, 0, {**h.up, Key("w", "C"): h.up[Key("h", "H")]}, h.num_examples, {}) for h in heads]
        shared = server.server_step(method, ServerState(), up).shared
        assert shared[Key("h", "H")].item() == shared[Key("w", "C")].item() == expected


@pytest.mark.parametrize("name", [name for name in METHODS if "A" in METHODS[name]().plan(0).up])
def test_uniform_weights_hold_for_every_method(name):
    """The numbers of examples change nothing. Seen to fail with a method that reads them from elsewhere."""
    replies = drawn(seed=2)
    others = [Reply(one.client, 0, one.up, 7, {}) for one in replies]
    found, expected = (step(name, *some, weights="uniform").shared for some in (replies, others))
    for key, value in expected.items():
        assert torch.equal(found[key], value)
