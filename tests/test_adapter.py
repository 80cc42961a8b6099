"""Laws of the cohort's adapter: W0 x + s B C A x for everyone's own factors, over one copy of the base weights."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers.pytorch_utils import Conv1D

from fedtri.adapters.bank import Cohort
from fedtri.adapters.initial import effective_update, initial_factors
from fedtri.adapters.layer import StackedLinear, TriLinear
from fedtri.adapters.layout import Factors, Key
from fedtri.errors import FedtriError
from fedtri.models.loading import find_targets, head_layers
from tiny import LABELS, assert_same, classifier

ALL = frozenset("ACBH")


class Model(nn.Module):
    """An up-projection, GPT-2's transposed kind of layer, and a head: no layer is square, none is like another."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down, self.head = nn.Linear(5, 8), Conv1D(4, 8), nn.Linear(4, 3)
        nn.init.normal_(self.down.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.down(torch.tanh(self.up(x))))


def cohort(clients: int, rank: int = 3) -> Cohort:
    return Cohort(Model().double(), targets=["up", "down"], head=["head"], clients=clients, rank=rank)


def factors(on: Cohort, rank: int, seed: int) -> dict[Key, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return {key: torch.randn(s, generator=rng, dtype=torch.float64) for key, s in on.layout.shapes(rank).items()}


def by_hand(own: Factors, rank: int, x: Tensor) -> Tensor:
    """The forward pass of a client with this rank and alpha = 6, with nothing stacked."""
    plain = Model().double()
    W = {"up": plain.up.weight, "down": plain.down.weight.mT}
    for name in W:
        W[name] = W[name] + 6 / rank * own[Key(name, "B")] @ own[Key(name, "C")] @ own[Key(name, "A")]
    hidden = linear(torch.tanh(linear(x, W["up"], plain.up.bias)), W["down"], plain.down.bias)
    return linear(hidden, own[Key("head.weight", "H")], own[Key("head.bias", "H")])


RANKS = (3, 1, 2)


@pytest.mark.parametrize("slots", [[0, 1, 2], [2, 0, 2, 1, 0, 0], [1, 1], [2]])
def test_each_sample_meets_its_own_clients_factors(slots):
    """Ranks 3, 1 and 2 in one cohort, a linear layer and a Conv1D with d_in ≠ d_out, a head with its bias. Seen to
    fail with C transposed, with one scale alpha / r_max for all, and with tokens folded into the batch in `rows`.
    """
    on = cohort(3)
    own = [factors(on, rank, seed) for seed, rank in enumerate(RANKS)]
    for slot, rank in enumerate(RANKS):
        on.write(slot, own[slot], rank, alpha=6.0)
    x = torch.randn(len(slots), 7, 5, dtype=torch.float64)
    on.route(slots)
    with torch.no_grad():
        found = on.model(x)
        expected = torch.stack([by_hand(own[slot], RANKS[slot], row) for slot, row in zip(slots, x, strict=True)])
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)


def test_zero_padding_learns_what_the_smaller_rank_learns_and_stays_zero():
    """Plain gradient descent and AdamW with decay; seen to fail with A padded by what a larger rank starts from."""
    x = torch.randn(4, 7, 5, dtype=torch.float64)
    for make, rate in ((torch.optim.SGD, 1e-5), (torch.optim.AdamW, 1e-2)):
        results = []
        for rank in (1, 3):
            on = cohort(2, rank)
            on.write(1, factors(on, 1, seed=5), 1, alpha=6.0)
            on.train_only(ALL)
            views = on.slices(1, ALL)
            optimizer = make(views.values(), lr=rate, weight_decay=0.1)
            for _ in range(5):
                optimizer.zero_grad(set_to_none=False)
                on.route([1] * 4)
                on.model(x).square().mean().backward()
                optimizer.step()
            results.append(on.read(1, ALL))
            padding = on.stacked(Key("up", "A"))[1, 1:], on.stacked(Key("up", "B"))[1, :, 1:]
            assert not any(part.any() for part in padding)
        assert_same(results[0], results[1], atol=1e-9, rtol=0)


def test_what_is_written_is_read_back_and_nobody_else_hears_of_it():
    on = cohort(3)
    own = [factors(on, rank, seed) for seed, rank in enumerate(RANKS)]
    for slot in (1, 0, 2):
        on.write(slot, own[slot], RANKS[slot], alpha=6.0)
    for slot in range(3):
        assert_same(on.read(slot, ALL), own[slot])
        assert_same(on.read(slot, frozenset("AH")), {key: v for key, v in own[slot].items() if key.factor in "AH"})
    on.read(0, ALL)[Key("up", "A")].zero_()
    assert_same(on.read(0, ALL), own[0])


def test_a_smaller_client_leaves_nothing_of_the_larger_one_before_it():
    on = cohort(1)
    on.write(0, factors(on, 3, seed=1), 3, alpha=6.0)
    on.write(0, factors(on, 1, seed=2), 1, alpha=6.0)
    assert not on.stacked(Key("up", "A"))[0, 1:].any()
    assert not on.stacked(Key("up", "B"))[0, :, 1:].any()


@pytest.mark.parametrize("clients", [1, 40])
def test_the_base_weights_exist_once(clients):
    """Counted in storages. Seen to fail with a copy of the base layer for each client."""
    model = classifier("bert")
    before = {parameter.data_ptr(): parameter.numel() for parameter in model.parameters()}
    names = find_targets(model, "query,intermediate.dense")
    on = Cohort(model, targets=names, head=head_layers(model), clients=clients, rank=2)
    after = {parameter.untyped_storage().data_ptr(): parameter.numel() for parameter in model.parameters()}
    own = sum(math.prod(shape) for shape in on.layout.shapes(2).values())
    head = sum(math.prod(shape) for _, shape in on.layout.head)
    assert len(set(after) & set(before)) == len(before) - 2  # all but the head's weight and bias
    assert sum(after.values()) == sum(before.values()) - head + clients * own


def test_a_fresh_cohort_is_the_model_itself():
    """ΔW = 0 in either basis, and the head as it was."""
    ids = torch.randint(4, 30, (3, 6))
    with torch.no_grad():
        expected = classifier("bert")(ids).logits
        for basis in ("kaiming", "orthonormal"):
            model = classifier("bert")
            names = find_targets(model, "query,intermediate.dense")
            on = Cohort(model, targets=names, head=head_layers(model), clients=2, rank=2)
            on.write(0, initial_factors(on.layout, {}, rank=2, seed=0, basis=basis), 2, alpha=4.0)
            on.route([0] * 3)
            torch.testing.assert_close(on.model(ids).logits, expected)


def test_the_head_is_never_wrapped_although_names_match():
    """RoBERTa's classifier has a layer called "dense", as its backbone does."""
    model = classifier("roberta", labels=len(LABELS))
    on = Cohort(model, targets=find_targets(model, "dense"), head=head_layers(model), clients=2, rank=2)
    assert [name for name, module in model.named_modules() if isinstance(module, StackedLinear)] == [
        "classifier.dense",
        "classifier.out_proj",
    ]
    wrapped = [name for name, module in model.named_modules() if isinstance(module, TriLinear)]
    assert wrapped == [layer.name for layer in on.layout.layers]
    assert all(name.startswith("roberta.encoder.") for name in wrapped)


def test_only_what_learns_has_a_gradient():
    on = cohort(2)
    for slot in range(2):
        on.write(slot, factors(on, 3, slot), 3, alpha=6.0)
    on.train_only(frozenset("C"))
    on.route([0, 1])
    on.model(torch.randn(2, 5, dtype=torch.float64)).sum().backward()
    assert {name for name, p in on.model.named_parameters() if p.grad is not None} == {"up.C", "down.C"}
    assert {name for name, p in on.model.named_parameters() if p.requires_grad} == {"up.C", "down.C"}


def test_a_core_between_a_and_a_frozen_zero_has_no_gradient_at_all():
    """The trap: B = 0 frozen, only C learns. In the orthonormal basis it does learn."""
    gradients = {}
    for basis in ("kaiming", "orthonormal"):
        on = cohort(1)
        on.write(0, initial_factors(on.layout, {}, rank=3, seed=0, basis=basis), 3, alpha=6.0)
        on.train_only(frozenset("C"))
        on.route([0])
        on.model(torch.randn(1, 5, dtype=torch.float64)).sum().backward()
        gradients[basis] = [on.layer(name).C.grad.abs().sum().item() for name in ("up", "down")]
    assert gradients["kaiming"] == [0, 0]
    assert min(gradients["orthonormal"]) > 0


def test_dropout_is_off_for_good():
    model = classifier("bert")
    Cohort(model, targets=find_targets(model, "auto"), head=head_layers(model), clients=1, rank=2)
    off = [not module.training for module in model.modules() if isinstance(module, nn.Dropout)]
    assert off
    assert all(off)


def test_initial_factors_come_from_the_seed_alone():
    layout = cohort(1).layout
    one, again, other = (initial_factors(layout, {}, rank=3, seed=seed) for seed in (0, 0, 1))
    assert_same(one, again)
    for name in ("up", "down"):
        assert not torch.equal(one[Key(name, "A")], other[Key(name, "A")])
        bound = 1 / math.sqrt(layout.layers[0 if name == "up" else 1].d_in)  # Kaiming-uniform with a = √5, as PEFT
        assert bound / 2 < one[Key(name, "A")].abs().max() <= bound
        assert torch.equal(one[Key(name, "C")], torch.eye(3))
        assert not one[Key(name, "B")].any()


@pytest.mark.parametrize("basis", ["kaiming", "orthonormal"])
def test_the_rows_of_a_smaller_rank_are_the_first_of_a_larger_one(basis):
    """Seen to fail in the orthonormal basis, where columns were drawn row by row."""
    layout = cohort(1).layout
    small, large = (initial_factors(layout, {}, rank=rank, seed=0, basis=basis) for rank in (2, 4))
    for name in ("up", "down"):
        torch.testing.assert_close(small[Key(name, "A")], large[Key(name, "A")][:2])
        torch.testing.assert_close(small[Key(name, "B")], large[Key(name, "B")][:, :2])


def test_the_orthonormal_basis_is_orthonormal():
    own = initial_factors(cohort(1).layout, {}, rank=4, seed=0, basis="orthonormal")
    for name in ("up", "down"):
        A, B, C = (own[Key(name, factor)] for factor in "ABC")
        torch.testing.assert_close(A @ A.mT, torch.eye(4))
        torch.testing.assert_close(B.mT @ B, torch.eye(4))
        assert not C.any()


def test_effective_update_by_hand():
    A, C, B = torch.tensor([[1.0, 2, 0]]), torch.tensor([[3.0]]), torch.tensor([[1.0], [-1]])
    own = {Key("l", "A"): A, Key("l", "C"): C, Key("l", "B"): B}
    expected = torch.tensor([[6.0, 12, 0], [-6, -12, 0]])
    torch.testing.assert_close(effective_update(own, "l", 2.0), expected)


def test_a_rank_larger_than_a_layer_is_refused_by_name():
    with pytest.raises(FedtriError, match=r"rank: 5 is larger than layer down \(4 x 8\); use at most 4"):
        cohort(1, rank=5)
