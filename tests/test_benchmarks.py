"""These benchmarks run at their smallest size on tiny data, and the work that is compared is the same work.

They run in this process, and what they start is forked from it: importing PyTorch anew would take most of the time.
"""

import importlib
import multiprocessing
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from processes import fork, script
from report import browsers
from tiny import Lab

FOLDER = Path(__file__).parents[1] / "benchmarks"
SMALLEST = {
    "aggregation": ["--quick", "--repeats", "1"],
    "server_scale": ["--quick"],
    "simulation": ["--quick", "--turns", "1", "--last", "1", "--only", "last", "--without", "Flower + PEFT"],
    "population": ["--clients", "3", "6", "--sampled", "3"],
    "overheads": ["--quick"],
    "report_page": ["--quick", "--repeats", "1"],
    "network_bytes": [],
    "gpu": ["--quick", "--device", "cpu", "--token-budget", "256"],
}
SAYS = {
    "aggregation": "| 768 | 10 | 8 |",
    "server_scale": "max deviation from POT",
    "simulation": "| fedtri, last 1 layers |",
    "population": "| 6 |",
    "overheads": "| checkpoint |",
    "report_page": "| one run |",
    "network_bytes": "| CE-LoRA, fedtri | 3,072 |",
    "gpu": "| bfloat16 |",
}


@pytest.fixture(scope="module")
def data(lab: Lab) -> list[str]:
    """A tiny model, and sentences under the column names that benchmarks expect."""
    path = lab.folder / "benchmark.csv"
    path.write_text(lab.data.read_text().replace("sentence,topic", "text,label", 1))
    return ["--data", str(path), "--model", str(lab.model())]


def said(folder: Path, name: str, *arguments: str) -> str:
    """What a benchmark prints, run to its end in a process of its own."""
    child = fork(folder, lambda: main(name, arguments))
    assert child.wait(600) == 0, child.errors.read_text()
    return child.output.read_text()


def main(name: str, arguments: Sequence[str]) -> None:
    """A benchmark's main function; the processes that it starts are forked."""
    sys.path.insert(0, str(FOLDER))
    sys.argv = [str(FOLDER / f"{name}.py"), *arguments]
    sys.modules.pop(name, None)  # a folder of tests may have the same name
    module = importlib.import_module(name)
    if hasattr(module, "mp"):
        module.mp = SimpleNamespace(Pipe=multiprocessing.Pipe, get_context=lambda _: multiprocessing)
    if hasattr(module, "subprocess"):
        module.subprocess = SimpleNamespace(run=forked)
    module.main()


def forked(command: Sequence[str], **_: object) -> SimpleNamespace:
    """As subprocess.run of a Python script."""
    child = script(Path(f"child-{os.getpid()}"), *command[1:])
    assert child.wait(600) == 0, child.errors.read_text()
    return SimpleNamespace(stdout=child.output.read_text())


@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", sorted(SMALLEST))
def test_a_benchmark_runs(name, data, tmp_path, monkeypatch):
    """The losses of fedtri and PEFT agree on the way, with and without kept states, else simulation.py fails."""
    if name == "report_page" and browsers.program() is None:
        pytest.skip(browsers.ABSENT)
    monkeypatch.chdir(tmp_path)
    own = data if name in ("simulation", "population", "overheads", "gpu") else []
    assert SAYS[name] in said(tmp_path, name, *SMALLEST[name], *own)


def test_work_that_is_not_the_same_is_an_error(monkeypatch):
    """Seen to fail with a check that compares nothing."""
    monkeypatch.syspath_prepend(str(FOLDER))
    simulation = importlib.import_module("simulation")
    work = simulation.Work("data", "folder")
    crew = [simulation.Contender(name, name, work, losses=losses) for name, losses in (("a", [0.7]), ("b", [0.7001]))]
    simulation.same_work(crew)
    crew[1].losses[0] = 0.701
    with pytest.raises(SystemExit, match="the work was not the same"):
        simulation.same_work(crew)


def test_without_a_gpu_nothing_is_said_of_one(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert said(tmp_path, "gpu") == "No GPU at hand: none was measured.\n"
