"""What `fedtri watch` shows, from rounds.jsonl alone."""

import io

from rich.console import Console

from fedtri.cli import watch
from fedtri.report import reading
from fedtri.storage import run_directory
from report import synthetic


def shown(folder) -> str:
    console = Console(width=100, file=io.StringIO(), record=True)
    watch.watch(folder, console, once=True)
    return console.export_text()


def test_a_finished_run(tmp_path):
    text = shown(synthetic.write(tmp_path / "run", rounds=5))
    assert "CE-LoRA on docstrings: round 5 of 5, finished" in text


def test_an_interrupted_run_says_how_to_go_on(tmp_path):
    folder = synthetic.write(tmp_path / "run", rounds=5, finished=False)
    assert "stopped; `fedtri resume" in shown(folder)
    with run_directory.locked(folder):
        assert watch.running(folder)
        assert "running, about" in shown(folder)
    assert not watch.running(folder)


def test_a_run_without_a_round(tmp_path):
    folder = synthetic.write(tmp_path / "run", finished=False)
    (folder / "rounds.jsonl").unlink()
    assert "round 0 of 10" in shown(folder)
    assert len(reading.load(folder).rounds) == 0


def test_a_row_of_blocks_does_not_make_a_point_look_like_a_leap():
    """Seen to fail with the lowest and highest value as its ends."""
    assert watch._spark([0.735, 0.744]) == "▁▂"
    assert watch._spark([0.2, 0.5, 0.9]) == "▁▄█"
