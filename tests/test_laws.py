"""Every method in METHODS is held to all laws of `fedtri.testing`; here stands what needs whole runs beside.

What executors owe each other, whatever the method, is in tests/execution; kill -9 is in tests/storage.
"""

import functools
import hashlib
from pathlib import Path

import pytest

from fedtri import atomic
from fedtri.config import Config
from fedtri.method import Method, Paper, Plan
from fedtri.methods import METHODS
from fedtri.methods.ce_lora import ce_lora
from fedtri.runs import lifecycle
from fedtri.state import ServerState
from fedtri.storage import checkpoint, run_directory
from fedtri.testing import laws
from tiny import Lab, assert_same

HELD = {**METHODS, "ce_lora, shared basis": functools.partial(ce_lora, basis="shared")}


@pytest.mark.parametrize("law", laws, ids=str)
@pytest.mark.parametrize("name", HELD)
def test_a_method_keeps_a_law(name, law, tmp_path):
    """How each law was seen to fail stands at the law."""
    law.check(HELD[name](), tmp_path)


def test_the_trap_of_a_core_between_a_and_a_frozen_zero(tmp_path):
    """B = 0 frozen: the core's gradient is exactly zero for ever, and a law notices."""
    trap = Method("trap", Paper("Trap"), lambda _: Plan.of(train="C"), lambda state, replies: state)
    (moves,) = (law for law in laws if str(law).startswith("every factor that learns moves"))
    with pytest.raises(AssertionError, match="trap breaks the law: every factor that learns moves"):
        moves.check(trap, tmp_path)


STOPS = ("in a round", "after a round", "before the first", "between the files of one")
LONG = {"rounds": 3, "fraction": 0.5, "seed": 3}


@pytest.mark.parametrize("where", STOPS)
@pytest.mark.parametrize("method", ["fedit", "ce_lora", "ditto"])
def test_a_run_directory_that_was_stopped_and_resumed_is_one_that_never_was(
    method, where, lab, tmp_path, monkeypatch, never
):
    """Seen to fail with seeds that leave out the round, with `deliveries` or `own` missing from the checkpoint, and
    with clients' files overwritten in place (in a round: what the killed round had trained was trained again)."""
    with pytest.raises(KeyboardInterrupt), monkeypatch.context() as patch:
        stop(lab.config(out=str(tmp_path / "run"), **LONG, method=method), where, patch)
    assert not (tmp_path / "run" / "summary.json").exists()
    resumed = list(lifecycle.resume(tmp_path / "run"))[-1]
    folder, state = never(method)
    assert_same(resumed.state, state)
    assert files(tmp_path / "run") == files(folder)
    lines = [[{**line, "seconds": 0} for line in run_directory.read_rounds(run)] for run in (tmp_path / "run", folder)]
    assert lines[0] == lines[1]


@pytest.fixture(scope="module")
def never(lab: Lab, tmp_path_factory):
    """The folder and the last state of a run that was never stopped, by method."""

    @functools.cache
    def run(method: str) -> tuple[Path, ServerState]:
        folder = tmp_path_factory.mktemp("never")
        last = list(lifecycle.run(lab.config(out=str(folder), **LONG, method=method)))[-1]
        return folder, last.state

    return run


def stop(config: Config, where: str, patch: pytest.MonkeyPatch) -> None:
    """Run until the moment `where`, and no further."""
    steps, write = iter(range(99)), atomic.write_bytes

    def on_step(*_: object) -> None:
        if next(steps) == {"in a round": 9, "before the first": 1}.get(where):  # of 2 clients' 3 steps a round
            raise KeyboardInterrupt

    def write_but_for_a_manifest(path: Path, data: bytes) -> str:
        if path.name == "00002.json":
            raise KeyboardInterrupt
        return write(path, data)

    if where == "between the files of one":
        patch.setattr(checkpoint.atomic, "write_bytes", write_but_for_a_manifest)
    for progress in lifecycle.run(config, lifecycle.Listener(on_step=on_step)):
        if where == "after a round" and progress.round == 1:
            raise KeyboardInterrupt


def files(folder: Path) -> dict[str, str]:
    """The digest of every client's own tensors and of its exported adapter, where the method has one."""
    found = checkpoint.load(folder / "checkpoints", folder / "clients")
    exported = sorted((folder / "adapters").glob("*/*.safetensors"))
    assert len(exported) in (0, 4)
    digests = {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in exported}
    return digests | {name: saved.digest for name, saved in found.clients.items()}
