"""From a name to a method: heads, and what the table of methods promises of all of them."""

import re

import pytest

from fedtri import methods
from fedtri.adapters.layout import FACTORS
from fedtri.errors import FedtriError
from fedtri.methods import METHODS


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
