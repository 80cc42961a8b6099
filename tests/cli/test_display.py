"""The live display of a run."""

import os

from rich.console import Console

import fedtri
from fedtri.cli import display


def test_the_live_display_counts_rounds_clients_steps_loss_accuracy_and_bytes():
    line = {
        "round": 1, "loss": 0.5, "accuracy": {"mean": 0.75, "worst": 0.5, "best": 1.0},
        "bytes": {"up": {"a": 1000}, "down": {"a": 500}}, "seconds": {"train": 1.0},
    }  # fmt: skip
    screen = Console(force_terminal=True, width=80, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    loaded = fedtri.load_config(None, ["rounds=2", "steps=4"])
    with display.display(screen, loaded) as shown:
        bar = shown.progress.tasks[0]  # pyright: ignore[reportAttributeAccessIssue]
        shown.phase(0, "train", ["a", "b", "c", "d"])
        for number in range(1, 5):  # the two of the first group, one ahead of the other
            shown.step("b", number, 0.7)
        first = bar.completed
        for number in range(1, 5):
            shown.step("a", number, 0.9)
        assert bar.completed > first
        assert bar.fields["status"] == "client 2/4  step 4/4  loss 0.900"
        first = bar.completed
        shown.step("d", 1, 0.8)  # the second group
        assert bar.fields["status"] == "client 3/4  step 1/4  loss 0.800"
        assert 0 < first < bar.completed < 1
        shown.round(line)
        assert bar.completed == 1
        assert bar.fields["result"] == "acc 0.750  1.5 kB"
        shown.phase(1, "evaluate", ["a"])
        assert bar.description == "round 2/2"
    assert "accuracy 0.750 (0.500 to 1.000)" in screen.export_text()
