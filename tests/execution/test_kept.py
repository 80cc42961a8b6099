"""Kept states: what a run without them finds, a run with them finds, and a resumed one keeps the same."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from execution.clients import adapted, examples, executor
from fedtri.errors import FedtriError
from fedtri.execution.fast.executor import first_adapted
from fedtri.execution.fast.kept import Keeping, KeptStates
from fedtri.models import loading
from tiny import assert_same, classifier, clients_tensors, rounds

UPPER = {"layers": "last:1", "targets": "query,intermediate.dense"}
LENGTHS = np.array([2, 1, 3, 1])


def states_of(rows: np.ndarray) -> torch.Tensor:
    """Token t of example i has state 10 i + t."""
    return torch.cat([10.0 * row + torch.arange(float(LENGTHS[row]))[:, None] for row in rows])


def kept(groups, **more) -> tuple[KeptStates, list[list[int]]]:
    asked: list[list[int]] = []

    def compute(rows: np.ndarray) -> torch.Tensor:
        asked.append(rows.tolist())
        return states_of(rows)

    keeping = Keeping(groups, **({"budget": 1 << 20} | more))
    return KeptStates(keeping, groups, LENGTHS, compute), asked


@pytest.mark.parametrize("budget", [1 << 20, 0], ids=["memory", "file"])
def test_states_come_in_the_order_that_is_asked_for(budget, tmp_path):
    """A group is computed when one of it is needed, and once. Seen to fail with states laid group by group."""
    found, asked = kept([np.array([3, 0]), np.array([2])], budget=budget, folder=tmp_path)
    for rows in ([0], [2, 3, 0], [3, 2]):
        assert torch.equal(found.of(np.array(rows)), states_of(np.array(rows)))
    assert asked == [[3, 0], [2]]
    assert found.of(np.array([0, 1])) is None
    assert not list(tmp_path.iterdir())


def test_states_may_be_kept_in_fewer_bits():
    found, _ = kept([np.arange(4)], dtype=torch.bfloat16)
    assert found.of(np.array([2])).dtype == torch.bfloat16


def test_a_file_that_finds_no_room_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=5))
    found, _ = kept([np.arange(4)], budget=0, folder=tmp_path)
    with pytest.raises(FedtriError, match=r"simulation\.prefix_budget: hidden states of 0 MB .* has 0 MB"):
        found.open()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("targets", "layers", "first"),
    [
        ("auto", "all", 0),
        ("auto", "last:1", 1),
        (r"bert\.(pooler\.dense|encoder\.layer\.1\..*query)", "all", 0),
    ],
)
def test_the_first_adapted_layer(targets, layers, first):
    """An adapter beside the layers counts as if it stood below them. Seen to fail with the last one's number."""
    assert first_adapted(adapted("bert", targets=targets, layers=layers)) == first


def test_where_all_layers_are_adapted_nothing_is_kept():
    assert executor(adapted("bert"), examples=examples(), keeping=Keeping([np.arange(4)], 1 << 20)).kept is None


@pytest.mark.parametrize(("method", "double"), [("ce_lora", True), ("centralized", True), ("fedit", False)])
def test_a_run_with_kept_states_is_the_run_without(method, double, lab, tmp_path):
    """Adapters and scores, in float64 and in the float32 it is for. Seen to fail with states of the wrong rows."""
    found = []
    for budget in (1024, 0):
        more = {"method": method, "double": double, "simulation__prefix_budget": budget, **UPPER}
        built = lab.federation(tmp_path / str(budget), **more)
        lines = [progress.line for progress in rounds(built)]
        assert (built.site.executor.kept is not None) == (budget > 0)
        found.append((clients_tensors(built), lines))
    assert_same(found[0][0], found[1][0], atol=1e-9 if double else 1e-6, rtol=0)
    for line, other in zip(found[0][1], found[1][1], strict=True):
        assert line["accuracy"] == other["accuracy"]
        assert line["loss"] == pytest.approx(other["loss"], rel=1e-5)


def test_a_resumed_run_keeps_the_same_states(lab, tmp_path):
    """Bit for bit in float32: groups do not depend on what was asked first. Seen to fail with groups of minibatches."""
    found = []
    for name, order in (("one", [0, 1]), ("other", [1, 0])):
        built = lab.federation(tmp_path / name, method="local", rounds=30, **UPPER)
        states, splits = built.site.executor.kept, list(built.site.splits.values())
        for client in order:
            for row in splits[client].train[:: 1 - 2 * client]:
                states.of(np.array([row]))
        found.append(states.of(np.concatenate([split.train for split in splits[:2]])))
    assert torch.equal(found[0], found[1])


def test_examples_that_a_run_meets_once_are_not_kept(lab, tmp_path):
    built = lab.federation(tmp_path, method="local", rounds=1, steps=1, evaluate=False, **UPPER)
    assert built.site.executor.kept.of(next(iter(built.site.splits.values())).train[:1]) is None


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
