"""Flower's simulation on Ray gives what one process gives, and says in one line what went wrong."""

import os
import shutil
from pathlib import Path

import pytest

from fedtri.errors import FedtriError
from fedtri.runs import lifecycle, simulation
from fedtri.storage import run_directory

pytestmark = [pytest.mark.timeout(600), pytest.mark.xdist_group("network")]


def finished(lab, out: Path, **values) -> Path:
    config = lab.config(out=str(out), method="ditto", wire__up="int8", fraction=0.5, rounds=2, **values)
    for _ in lifecycle.run(config):
        pass
    return out


def test_a_run_on_ray_ends_bit_for_bit_as_in_one_process(lab, tmp_path):
    """Two clients of four a round, with a personal copy and int8's residual, which an actor must find again."""
    alone = finished(lab, tmp_path / "local", simulation__group=1)
    spread = finished(lab, tmp_path / "ray", simulation__group=1, transport="flower-sim")
    lines = [run_directory.read_rounds(folder) for folder in (alone, spread)]
    assert [line["bytes"] for line in lines[0]] == [line["bytes"] for line in lines[1]]
    assert [line["accuracy"] for line in lines[0]] == [line["accuracy"] for line in lines[1]]
    for path in sorted((alone / "adapters").rglob("*.safetensors")):
        assert path.read_bytes() == (spread / path.relative_to(alone)).read_bytes()


def test_without_ray_one_line_says_what_to_install(lab, tmp_path, monkeypatch):
    monkeypatch.setattr(lifecycle, "find_spec", lambda name: None)
    with pytest.raises(FedtriError, match=r"pip install 'fedtri\[simulation\]'"):
        finished(lab, tmp_path / "run", transport="flower-sim")


def test_what_fails_in_an_actor_ends_the_run_in_one_line(lab, tmp_path, monkeypatch):
    """The data are gone when the one actor looks for them; a start that fails leaves nothing behind."""
    data = shutil.copy(lab.data, tmp_path / "data.csv")

    def build(*args):
        built = simulation.build(*args)
        data.unlink()
        return built

    monkeypatch.setattr(lifecycle, "build", build)
    with pytest.raises(FedtriError, match=r"^client-0\d: .*data.csv.*no such file"):
        finished(lab, tmp_path / "run", data=str(data), transport="flower-sim", simulation__client_cpus=os.cpu_count())
    assert not (tmp_path / "run").exists()
