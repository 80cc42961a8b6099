"""Laws of a model with adapters: W0 x + s B C A x with one client's factors, and nothing left of the one before."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers.pytorch_utils import Conv1D

from fedtri.adapters.initial import initial_factors
from fedtri.adapters.layer import AdaptedLinear, HeadLinear
from fedtri.adapters.layout import Factors, Key
from fedtri.adapters.model import AdaptedModel, adapter, install, load, of_classes, parameters, read, unload
from fedtri.errors import FedtriError
from fedtri.models.loading import find_targets, head_layers
from tiny import LABELS, assert_same, classifier

ALL = frozenset("ACBHSWab")
EXACT = {"atol": 1e-12, "rtol": 1e-12}


class Model(nn.Module):
    """An up-projection, GPT-2's transposed kind of layer, and a head: no layer is square, none is like another."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down, self.head = nn.Linear(5, 8), Conv1D(4, 8), nn.Linear(4, 3)
        nn.init.normal_(self.down.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.down(torch.tanh(self.up(x))))


def adapted(rank: int = 3, **how) -> AdaptedModel:
    return install(Model().double(), targets=["up", "down"], head=["head"], rank=rank, **how)


def factors(on: AdaptedModel, rank: int, seed: int) -> dict[Key, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return {key: torch.randn(s, generator=rng, dtype=torch.float64) for key, s in on.layout.shapes(rank).items()}


X = torch.randn(2, 7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def by_hand(own: Factors, rank: int, update) -> Tensor:
    """The forward pass of a client with this rank and alpha = 6; `update` makes a layer's whole weight."""
    plain = Model().double()
    weight = {"up": plain.up.weight, "down": plain.down.weight.mT}
    for name, W in weight.items():
        f = {key.factor: value for key, value in own.items() if key.layer == name}
        weight[name] = update(W, f, 6 / rank)
    hidden = linear(torch.tanh(linear(X, weight["up"], plain.up.bias)), weight["down"], plain.down.bias)
    return linear(hidden, own[Key("head.weight", "H")], own[Key("head.bias", "H")])


def lora(W, f, s):
    return W + s * f["B"] @ f["C"] @ f["A"]


def heads(W, f, s):
    first, second = f["C"].chunk(2)  # (2, 2) each, one under the other
    core = torch.block_diag(f["S"][0] * first, f["S"][1] * second)
    return W + s * f["B"] @ core @ f["A"]


def dora(W, f, s):
    tuned = lora(W, f, s)
    return f["M"][:, None] * tuned / tuned.norm(dim=1, keepdim=True)


WAYS = {
    "lora": ({}, lora),
    "heads": ({"extra": "S", "heads": 2}, heads),
    "dense": ({"extra": "W"}, lambda W, f, s: lora(W, f, s) + f["W"]),
    "second adapter": ({"extra": "ab"}, lambda W, f, s: lora(W, f, s) + s * f["b"] @ f["a"]),
    "dora": ({"kind": "dora"}, dora),
    "hira": ({"kind": "hira"}, lambda W, f, s: W + W * (s * f["B"] @ f["C"] @ f["A"])),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_layer_computes_its_definition(way):
    """Clients of ranks 4 and 2, one after the other. Seen to fail with C transposed, with S's heads swapped, with one
    scale for all ranks, with a bias that DoRA scales, and with b a added without s."""
    how, update = WAYS[way]
    on = adapted(4, **how)
    for seed, rank in enumerate((4, 2, 4)):
        own = factors(on, rank, seed)
        load(on, own, rank=rank, alpha=6.0)
        with torch.no_grad():
            torch.testing.assert_close(on.model(X), by_hand(own, rank, update), **EXACT)


def test_what_is_loaded_is_read_back_and_nothing_of_the_one_before():
    """The larger client first. Seen to fail with a second adapter that stays."""
    on = adapted(extra="ab")
    large, small = factors(on, 3, 0), factors(on, 1, 1)
    small = {key: value for key, value in small.items() if key.factor not in "ab"}
    load(on, large, rank=3, alpha=6.0)
    assert_same(read(on, ALL), large)
    load(on, small, rank=1, alpha=6.0)
    found = on.model(X)
    assert set(on.layer("up").factors) == {"A", "C", "B"}
    assert_same(read(on, frozenset("AH")), {key: v for key, v in small.items() if key.factor in "AH"})
    with torch.no_grad():
        torch.testing.assert_close(found, by_hand(small, 1, lora), **EXACT)


def test_the_model_holds_copies():
    on = adapted()
    own = factors(on, 3, 0)
    load(on, own, rank=3, alpha=6.0)
    before = {key: value.clone() for key, value in own.items()}
    with torch.no_grad():
        for parameter in parameters(on, ALL).values():
            parameter.zero_()
    assert_same(own, before)


def test_without_a_client_it_is_the_frozen_model():
    on = adapted()
    load(on, factors(on, 3, 0), rank=3, alpha=6.0)
    unload(on)
    plain = Model().double()
    torch.testing.assert_close(on.model.down(on.model.up(X)), plain.down(plain.up(X)), **EXACT)


def test_a_backbone_that_learns_is_the_clients_own_and_comes_back():
    """Seen to fail with weights left from the client before."""
    on = install(Model().double(), targets=[], head=["head"], rank=1, extra="P")
    before = {key: value.clone() for key, value in on.initial.items()}
    assert [key.layer for key in before] == ["up.weight", "up.bias", "down.weight", "down.bias"]
    own = factors(on, 1, 0)
    load(on, own, rank=1, alpha=1.0)
    assert_same(read(on, frozenset("PH")), own)
    unload(on)
    assert_same(read(on, frozenset("P")), before)


def test_a_head_of_ones_own_classes_never_answers_with_another():
    """Seen to fail with rows taken as the first classes."""
    on = adapted()
    own = of_classes(on.layout, factors(on, 3, 0), np.array([0, 2]))
    assert own[Key("head.weight", "H")].shape == (2, 4)
    load(on, own, rank=3, alpha=6.0, classes=np.array([0, 2]))
    y = on.model(X)
    assert torch.isneginf(y[..., 1]).all()
    load(on, factors(on, 3, 0), rank=3, alpha=6.0)
    torch.testing.assert_close(y[..., [0, 2]], on.model(X)[..., [0, 2]], **EXACT)


@pytest.mark.parametrize("where", ["model", "by layer"])
def test_only_what_learns_has_a_gradient(where):
    on = adapted()
    own = factors(on, 3, 0)
    if where == "model":
        load(on, own, rank=3, alpha=6.0)
        for parameter in parameters(on, frozenset("C")).values():
            parameter.requires_grad_()
        on.model(X).sum().backward()
        assert {name for name, p in on.model.named_parameters() if p.grad is not None} == {
            "up.factors.C", "down.factors.C",
        }  # fmt: skip
    else:
        learns = {key: nn.Parameter(value) for key, value in own.items() if key.factor == "C"}
        found = adapter(on, {**own, **learns}, rank=3, alpha=6.0)
        assert all(found.layers[key.layer].C is parameter for key, parameter in learns.items())
        assert not any(layer.A.requires_grad or layer.B.requires_grad for layer in found.layers.values())


def test_the_base_weights_exist_once():
    """Counted in storages. Seen to fail with a copy of the base layer."""
    model = classifier("bert")
    before = {parameter.data_ptr() for parameter in model.parameters()}
    on = install(model, targets=find_targets(model, "query"), head=head_layers(model), rank=2)
    load(on, initial_factors(on.layout, {}, rank=2, seed=0), rank=2, alpha=4.0)
    after = {parameter.data_ptr() for name, parameter in model.named_parameters() if ".factors." not in name}
    assert len(after & before) == len(before)


def test_an_initial_client_is_the_model_itself():
    """ΔW = 0 from A or from a core, with a second adapter too, and the head as it was."""
    ids = torch.randint(4, 30, (3, 6))
    with torch.no_grad():
        expected = classifier("bert")(ids).logits
        for core in (False, True):
            model = classifier("bert")
            names = find_targets(model, "query,intermediate.dense")
            on = install(model, targets=names, head=head_layers(model), rank=2, extra="ab")
            load(on, initial_factors(on.layout, {}, rank=2, seed=0, core=core), rank=2, alpha=4.0)
            torch.testing.assert_close(model(ids).logits, expected)


def test_the_head_is_never_adapted_although_names_match():
    """RoBERTa's classifier has a layer called "dense", as its backbone does."""
    model = classifier("roberta", labels=len(LABELS))
    on = install(model, targets=find_targets(model, "dense"), head=head_layers(model), rank=2)
    assert [name for name, module in model.named_modules() if isinstance(module, HeadLinear)] == [
        "classifier.dense",
        "classifier.out_proj",
    ]
    found = [name for name, module in model.named_modules() if isinstance(module, AdaptedLinear)]
    assert found == [layer.name for layer in on.layout.layers]
    assert all(name.startswith("roberta.encoder.") for name in found)


def test_a_core_between_a_and_a_frozen_zero_has_no_gradient_at_all():
    """The trap: B = 0 frozen, only C learns. Between a basis on either side it does learn."""
    gradients = {}
    for core in (False, True):
        on = adapted()
        load(on, initial_factors(on.layout, {}, rank=3, seed=0, core=core), rank=3, alpha=6.0)
        cores = parameters(on, frozenset("C"))
        for one in cores.values():
            one.requires_grad_()
        on.model(X).sum().backward()
        gradients[core] = [one.grad.abs().sum().item() for one in cores.values()]
    assert gradients[False] == [0, 0]
    assert min(gradients[True]) > 0


def test_dropout_is_off_for_good():
    model = classifier("bert")
    install(model.train(), targets=find_targets(model, "auto"), head=head_layers(model), rank=2)
    off = [not module.training for module in model.modules() if isinstance(module, nn.Dropout)]
    assert off
    assert all(off)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"rank": 5}, r"rank: 5 is larger than layer down \(4 x 8\); use at most 4"),
        ({"rank": 3, "heads": 2}, r"rank: expected a multiple of method_options.heads \(2\), got 3"),
        ({"rank": 3, "extra": "P"}, "training the backbone itself takes no targets"),
        ({"rank": 3, "mixed_precision": True}, "expected a model in float32, got float64"),
    ],
)
def test_what_cannot_be_is_one_line(how, said):
    with pytest.raises(FedtriError, match=said) as error:
        install(Model().double(), targets=["up", "down"], head=["head"], **how)
    assert "\n" not in str(error.value)


def test_kaimings_bound_is_pefts():
    """1/√d_in: Kaiming-uniform with a = √5."""
    layout = adapted().layout
    own = initial_factors(layout, {}, rank=3, seed=0)
    for layer in layout.layers:
        bound = 1 / math.sqrt(layer.d_in)
        assert bound / 2 < own[Key(layer.name, "A")].abs().max() <= bound
