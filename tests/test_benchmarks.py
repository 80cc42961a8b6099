"""These benchmarks run at their smallest size on tiny data, and the work that is compared is the same work."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fedtri.errors import FedtriError
from fedtri.report import files
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
    "gpu": ["--quick", "--device", "cpu"],
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


def run(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(FOLDER / f"{name}.py"), *arguments], capture_output=True, text=True)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", sorted(SMALLEST))
def test_a_benchmark_runs(name, data):
    """The losses of fedtri and PEFT agree on the way, with and without kept states, else simulation.py fails."""
    if name == "report_page":
        try:
            files.browser()
        except FedtriError:
            pytest.skip("no browser found: apt-get install chromium")
    own = data if name in ("simulation", "population", "overheads", "gpu") else []
    done = run(name, *SMALLEST[name], *own)
    assert done.returncode == 0, done.stderr
    assert SAYS[name] in done.stdout


def test_work_that_is_not_the_same_is_an_error(monkeypatch):
    """Seen to fail with a check that compares nothing."""
    monkeypatch.syspath_prepend(str(FOLDER))
    spec = importlib.util.spec_from_file_location("simulation", FOLDER / "simulation.py")
    assert spec is not None
    simulation = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "simulation", simulation)
    assert spec.loader is not None
    spec.loader.exec_module(simulation)
    work = simulation.Work("data", "folder")
    crew = [simulation.Contender(name, name, work, losses=losses) for name, losses in (("a", [0.7]), ("b", [0.7001]))]
    simulation.same_work(crew)
    crew[1].losses[0] = 0.701
    with pytest.raises(SystemExit, match="the work was not the same"):
        simulation.same_work(crew)


def test_without_a_gpu_nothing_is_said_of_one():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert run("gpu").stdout == "No GPU at hand: none was measured.\n"
