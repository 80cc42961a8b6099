"""Passes that begin with kept states give what whole passes give, and a run with them what a run without them gives."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fedtri.adapters.bank import Cohort
from fedtri.errors import FedtriError
from fedtri.execution import prefix
from fedtri.execution.routing import Routing
from fedtri.models import loading
from test_packing import SLOTS, batch, cohort_of
from tiny import SIZES, assert_same, classifier, clients_tensors, rounds

UPPER = {"layers": "last:1", "targets": "query,intermediate.dense"}


class Texts:
    """Six texts as a task's examples."""

    def __init__(self, even: bool = False) -> None:
        self.inputs = {"input_ids": batch()["input_ids"][:, :3]} if even else batch()
        self.lengths = np.full(6, 3) if even else batch()["attention_mask"].sum(1).numpy()
        self.asked: list[list[int]] = []

    def batch(self, rows):
        self.asked.append(rows.tolist())
        cut = int(self.lengths[rows].max())
        return {name: value[rows, :cut] for name, value in self.inputs.items()}


def upper(kind: str) -> Cohort:
    """Adapters on the second of two layers."""
    return cohort_of(kind, "auto", "last:1")


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["exact", "bfloat16"])
@pytest.mark.parametrize("even", [False, True], ids=["ragged", "no mask"])
@pytest.mark.parametrize("kind", sorted(SIZES))
def test_kept_states_give_the_logits_and_gradients_of_whole_passes(kind, even, dtype, tmp_path):
    """On every architecture, packed and padded, from memory and from a file. Seen to fail with rows looked up by their
    place in the batch, with the states of padding, and with layers below that run on what they are handed.
    """
    on, texts, rows = upper(kind), Texts(even), np.array([4, 1, 0, 5, 2, 3])
    assert on.prefix is not None
    found = []
    for budget in (None, 1 << 20, 0):
        if budget is not None:
            on.prefix.keep(texts, [rows[:2], rows[2:]], budget=budget, folder=tmp_path, dtype=dtype)
        for pack in (False, True):
            on.train_only(frozenset("ACBH"))
            on.route(np.array(SLOTS)[rows], pack=pack, examples=None if budget is None else rows)
            logits = on.model(**texts.batch(rows)).logits
            (logits * torch.arange(1.0, 4.0)).sum().backward()
            found.append([logits.detach(), *(on.stacked(k).grad.clone() for k in on.layout.keys(frozenset("ACBH")))])
    tolerance = {"atol": 1e-10, "rtol": 1e-9} if dtype is None else {"atol": 1.0, "rtol": 0.1}
    for other in found[1:]:
        torch.testing.assert_close(found[0], other, **tolerance)
    assert (dtype is None) or not torch.equal(found[0][0], found[-1][0])
    assert not list(tmp_path.iterdir())


def test_each_example_is_computed_once_and_only_where_it_is_kept():
    """Its whole group with it. Seen to fail with groups computed at every pass."""
    on, texts = upper("bert"), Texts()
    below: list[int] = []
    on.model.bert.encoder.layer[0].attention.register_forward_pre_hook(lambda *_: below.append(1))
    on.prefix.keep(texts, [np.array([0, 1]), np.array([2, 3])], budget=1 << 20)
    for rows in ([0], [1, 0], [2, 1], [3, 2, 1, 0]):
        on.route([0] * len(rows), pack=True, examples=np.array(rows))
        on.model(**Texts().batch(np.array(rows)))
    assert texts.asked == [[0, 1], [2, 3]]
    assert len(below) == 2
    on.route([0, 0], pack=True, examples=np.array([0, 4]))
    on.model(**Texts().batch(np.array([0, 4])))
    assert len(below) == 3


def test_a_batch_without_row_numbers_is_computed_whole():
    """Texts that a user asks about are no examples of the run. Seen to fail with states left over from before."""
    on, texts = upper("bert"), Texts()
    on.prefix.keep(texts, [np.arange(6)], budget=1 << 20)
    on.route(SLOTS, pack=True, examples=np.arange(6))
    on.model(**batch())
    other = {**batch(), "input_ids": batch()["input_ids"] % 7 + 5 * batch()["attention_mask"]}
    on.route(SLOTS, pack=True)
    packed = on.model(**other).logits
    on.route(SLOTS)
    torch.testing.assert_close(packed, on.model(**other).logits, atol=1e-10, rtol=1e-9)


def test_a_model_whose_results_differ_goes_on_without():
    """A layer above that looks at what one below did. Seen to fail with a trial that always agrees."""
    model, seen = classifier("bert"), {"last": torch.zeros(())}
    first, second = model.bert.encoder.layer
    first.attention.register_forward_hook(lambda module, args, out: seen.update(last=out[0].abs().sum()))
    second.register_forward_hook(lambda module, args, out: out + seen["last"])
    model.bert.register_forward_pre_hook(lambda *_: seen.update(last=torch.zeros(())))
    targets = ["bert.encoder.layer.1.attention.self.query"]
    assert prefix.prepare(model, targets, Routing()) is None
    assert "forward" not in vars(first)


@pytest.mark.parametrize("method", ["fedit", "ce_lora", "centralized"])
def test_a_run_with_kept_states_is_the_run_without(method, lab, tmp_path):
    """Adapters and scores, in float64 and in the float32 it is for. Seen to fail with states of the wrong rows."""
    for double, atol in ((True, 1e-9), (False, 1e-6)):
        found = []
        for budget in (1024, 0):
            built = lab.federation(
                tmp_path / f"{double}-{budget}", method=method, double=double, simulation__prefix_budget=budget, **UPPER
            )
            lines = [progress.line for progress in rounds(built)]
            kept = built.site.cohort.prefix._states
            assert (kept is not None) == (budget > 0)
            found.append((clients_tensors(built), lines))
        assert_same(found[0][0], found[1][0], atol=atol, rtol=0)
        for line, other in zip(found[0][1], found[1][1], strict=True):
            assert line["accuracy"] == other["accuracy"]
            assert line["loss"] == pytest.approx(other["loss"], rel=1e-5)


def test_a_resumed_run_keeps_the_same_states(lab, tmp_path):
    """Bit for bit in float32: groups do not depend on what was asked first. Seen to fail with groups of minibatches."""
    found = []
    for name, order in (("one", [0, 1]), ("other", [1, 0])):
        built = lab.federation(tmp_path / name, method="local", rounds=30, **UPPER)
        on, splits = built.site.cohort, list(built.site.splits.values())
        for client in order:
            for row in splits[client].train[:: 1 - 2 * client]:
                assert on.prefix.ready(np.array([row]))
        found.append(on.prefix._states[np.isin(np.arange(len(on.prefix._states)), _places(on, splits[:2]))])
    assert torch.equal(found[0], found[1])


def _places(on, splits) -> np.ndarray:
    rows = np.concatenate([split.train for split in splits])
    lengths, starts = on.prefix._texts.lengths[rows], on.prefix._start[rows]
    return np.concatenate([np.arange(start, start + n) for start, n in zip(starts, lengths, strict=True)])


def test_layers_that_are_computed_again_in_the_backward_pass_get_no_kept_states():
    """They would meet what the layer below handed on. Seen to fail without the look at gradient checkpointing."""
    on = upper("bert")
    on.prefix.keep(Texts(), [np.arange(6)], budget=1 << 20)
    on.model.bert.encoder.layer[1].gradient_checkpointing = True
    assert not on.prefix.ready(np.array([0]))


def test_examples_that_a_run_meets_once_are_not_kept(lab, tmp_path):
    built = lab.federation(tmp_path, method="local", rounds=1, steps=1, evaluate=False, **UPPER)
    assert not built.site.cohort.prefix.ready(next(iter(built.site.splits.values())).train[:1])


@pytest.mark.parametrize(
    ("layers", "said"),
    [
        ("last:0", "layers: expected"),
        ("first:2", "layers: expected"),
        ("last:3", 'expected at most last:2, the model\'s layers, got "last:3"'),
    ],
)
def test_nonsense_is_one_line(layers, said, lab, tmp_path):
    with pytest.raises(FedtriError) as error:
        lab.federation(tmp_path, layers=layers)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_last_layers_without_targets_are_refused():
    model = classifier("bert")
    with pytest.raises(FedtriError, match='"last:1" leaves none of the targets'):
        loading.find_targets(model, r"bert\.encoder\.layer\.0\..*query", "last:1")
    assert loading.find_targets(model, "auto", "last:2") == loading.find_targets(model, "auto")
    assert loading.find_targets(model, "auto", "last:1") == [
        f"bert.encoder.layer.1.attention.self.{name}" for name in ("query", "value")
    ]


def test_a_file_that_finds_no_room_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=5))
    on = upper("bert")
    on.prefix.keep(Texts(), [np.arange(6)], budget=0, folder=tmp_path)
    with pytest.raises(FedtriError, match=r"simulation\.prefix_budget: hidden states of 0 MB .* has 0 MB"):
        on.prefix.ready(np.array([0]))
    assert not list(tmp_path.iterdir())
