"""What the tests of the command line share: commands in this process, and a finished run to use."""

import sys

import pytest

from fedtri.cli import main

FAST = [
    "--method",
    "ce_lora",
    "--set",
    "layers=all",
    "--rounds",
    "2",
    "--clients",
    "3",
    "--set",
    "steps=1",
    "--set",
    "rank=2",
    "--set",
    "batch_size=4",
]


@pytest.fixture
def command(capsys, monkeypatch):
    """Runs `fedtri ARGS` in this process; returns (exit code, standard output, standard error)."""

    def call(*args: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["fedtri", *map(str, args)])
        capsys.readouterr()
        code = 0
        try:
            main.main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        return code, *capsys.readouterr()

    return call


@pytest.fixture
def tiny(lab):
    """The options that choose the tiny model and its data."""
    columns = ["--set", "columns.text=sentence", "--set", "columns.label=topic", "--set", "partition=iid"]
    return ["--model", lab.model(), "--data", lab.data, *columns, *FAST]


@pytest.fixture
def finished(command, tiny, tmp_path):
    """The folder of a finished run."""
    code, _, error = command("run", *tiny, "--out", tmp_path / "run")
    assert (code, error) == (0, "")
    return tmp_path / "run"


@pytest.fixture
def refused(command):
    """Runs a command that must end in one line and exit code 2; returns the line."""

    def call(*args: object) -> str:
        code, out, error = command(*args)
        assert code == 2, out
        assert len(error.splitlines()) == 1, error
        assert error.startswith("fedtri: ")
        return error.removeprefix("fedtri: ").rstrip()

    return call
