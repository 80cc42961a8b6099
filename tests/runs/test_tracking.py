"""Trackers are told every round's numbers, one way for all of them; one that is absent is one line."""

import sys
import types
from pathlib import Path

import pytest

from fedtri.errors import FedtriError
from fedtri.runs import tracking

LINE = {
    "round": 1,
    "loss": 0.5,
    "accuracy": {"mean": 0.7, "worst": 0.6, "best": 0.8, "clients": {"a": 0.6, "b": 0.8}},
    "accuracy_local": None,
    "bytes": {"up": {"a": 10, "b": 20}, "down": {"a": 5}},
    "seconds": {"train": 1.5},
}
FLAT = {
    "loss": 0.5, "accuracy/mean": 0.7, "accuracy/worst": 0.6, "accuracy/best": 0.8, "bytes/up": 30, "bytes/down": 5,
    "seconds/train": 1.5,
}  # fmt: skip


def test_a_line_as_flat_numbers():
    assert tracking.values(LINE) == FLAT


def test_unknown_and_absent_trackers_are_one_line(monkeypatch):
    with pytest.raises(FedtriError, match="expected one of tensorboard"), tracking.tracker("aim", {}):
        pass
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(FedtriError, match=r"pip install 'fedtri\[wandb\]'"), tracking.tracker("wandb", {}):
        pass


def test_without_a_tracker_nothing_is_told():
    with tracking.tracker(None, {}) as tell:
        tell(Path(), LINE)


def _recorder(told: list) -> types.SimpleNamespace:
    """A module that answers to what mlflow, wandb and trackio are asked, and remembers it."""

    def note(name):
        return lambda *args, **more: told.append((name, args, more))

    run = types.SimpleNamespace(log=note("log"), finish=note("finish"))
    calls = ("set_experiment", "start_run", "log_params", "log_metrics", "end_run", "log", "finish")
    return types.SimpleNamespace(**{name: note(name) for name in calls}, init=lambda **more: run)


@pytest.mark.parametrize(
    ("name", "logged", "closed"),
    [("mlflow", "log_metrics", "end_run"), ("wandb", "log", "finish"), ("trackio", "log", "finish")],
)
def test_each_is_told_in_its_own_words(monkeypatch, name, logged, closed):
    told: list = []
    monkeypatch.setitem(sys.modules, name, _recorder(told))
    with tracking.tracker(name, {"rank": 8}) as tell:
        tell(Path("runs/x"), LINE)
        tell(Path("runs/x"), LINE | {"round": 2})
    assert [(args[0], more["step"]) for what, args, more in told if what == logged] == [(FLAT, 1), (FLAT, 2)]
    assert told[-1][0] == closed


def test_tensorboard_reads_back(tmp_path):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason="no tensorboard")
    with tracking.tracker("tensorboard", {"rank": 8}) as tell:
        tell(tmp_path, LINE)
        tell(tmp_path, LINE | {"round": 2, "loss": 0.25})
    found = reader.EventAccumulator(str(tmp_path / "tensorboard"))
    found.Reload()
    assert [(e.step, e.value) for e in found.Scalars("loss")] == [(1, 0.5), (2, 0.25)]
    assert set(FLAT) <= set(found.Tags()["scalars"])
