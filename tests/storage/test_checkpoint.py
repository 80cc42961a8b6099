"""Laws of checkpoints: a run killed anywhere ends as one never killed; a damaged file is noticed, never used."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fedtri import atomic, config
from fedtri.adapters.layout import Key
from fedtri.errors import FedtriError
from fedtri.messages import Held, Mixture, Sketch
from fedtri.runs import lifecycle
from fedtri.state import Deliveries, ServerState, Similarity
from fedtri.storage import checkpoint, run_directory
from fedtri.storage.client_store import ClientStore
from processes import fedtri
from tiny import Lab, assert_same

WANTED = {"method": "ce_lora", "rounds": 4, "clients": 4, "steps": 6, "fraction": 0.8, "simulation__group": 1}


@pytest.fixture(scope="module")
def never(lab: Lab, tmp_path_factory) -> Path:
    """A run that nothing happened to."""
    folder = tmp_path_factory.mktemp("never")
    torch.set_num_threads(1)
    list(lifecycle.run(lab.config(out=str(folder), **WANTED)))
    return folder


@pytest.fixture(scope="module")
def killed(lab: Lab, tmp_path_factory) -> Path:
    """`fedtri run`, killed with -9 in its third round: one client has trained, another has not."""
    place = tmp_path_factory.mktemp("killed")
    folder = place / "run"
    (place / "run.toml").write_text(config.dumps(lab.config(**WANTED)))
    running = fedtri(place / "said", "run", place / "run.toml", "--out", folder)
    begun = running.until(lambda: list(folder.glob("clients/*/00003-trained.safetensors")))
    running.kill()
    assert len(begun) < 3
    assert not (folder / "checkpoints" / "00003.json").exists()
    assert len(run_directory.read_rounds(folder)) == 2
    return folder


@pytest.fixture
def remains(killed: Path, tmp_path: Path) -> Path:
    """A copy of what the killed run left."""
    return shutil.copytree(killed, tmp_path / "run")


def assert_the_same_end(folder: Path, never: Path) -> None:
    """Adapters and the clients' own tensors bit for bit; the log too, but for seconds."""
    for pattern in ("adapters/*/*.safetensors", "clients/*/00004-received.safetensors"):
        names = sorted(path.relative_to(never) for path in never.glob(pattern))
        assert len(names) == 4
        for name in names:
            assert (folder / name).read_bytes() == (never / name).read_bytes(), name
    said = [[{**line, "seconds": 0} for line in run_directory.read_rounds(run)] for run in (folder, never)]
    assert said[0] == said[1]
    results = [{k: v for k, v in run_directory.read_summary(run).items() if k != "seconds"} for run in (folder, never)]
    assert results[0] == results[1]


def test_a_run_killed_in_a_round_and_resumed_ends_as_one_never_killed(remains, never, tmp_path):
    """With the real commands. Seen to fail with batches seeded without the round, and with a client's file that the
    killed round wrote taken as what the checkpoint left (the same name a save, overwritten in place).
    """
    resumed = fedtri(tmp_path / "said", "resume", remains)
    assert resumed.wait() == 0, resumed.errors.read_text()
    assert_the_same_end(remains, never)


NEWEST = {
    "the manifest": "checkpoints/00002.json",
    "the server's tensors": "checkpoints/00002.safetensors",
    "a client's tensors": "clients/*/00002-*.safetensors",
}


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def alter(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-9] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [cut, alter, Path.unlink, lambda path: path.write_bytes(b"")])
@pytest.mark.parametrize("what", NEWEST)
def test_a_damaged_checkpoint_is_noticed_and_the_one_before_it_is_used(what, damage, killed, tmp_path):
    """Seen to fail with the digests not compared (an altered file is used), and with the clients' files of the round
    before pruned as soon as a round is done.
    """
    remains = shutil.copytree(killed, tmp_path / "run")
    current = json.loads((remains / "checkpoints" / "00002.json").read_text())["clients"]
    needed = [remains / "clients" / saved["file"] for saved in current.values()]
    damage(next(p for p in remains.glob(NEWEST[what]) if "clients" not in p.parts or p in needed))
    found = checkpoint.load(remains / "checkpoints", remains / "clients")
    assert found.state.round == 1


@pytest.mark.parametrize("what", NEWEST)
def test_a_run_that_lost_its_newest_checkpoint_ends_the_same_too(what, remains, never):
    cut(next(iter(sorted(remains.glob(NEWEST[what])))))
    assert [progress.round for progress in lifecycle.resume(remains)] in ([2, 3, 4], [3, 4])
    assert_the_same_end(remains, never)


def test_a_run_killed_before_its_first_checkpoint_starts_over(remains, never):
    shutil.rmtree(remains / "checkpoints")
    (remains / "rounds.jsonl").unlink()
    assert [progress.round for progress in lifecycle.resume(remains)] == [1, 2, 3, 4]
    assert_the_same_end(remains, never)


def test_a_log_line_cut_short_is_written_again(remains, never):
    """The line goes out after the checkpoint: a kill between them leaves half of it, or none."""
    log = remains / "rounds.jsonl"
    log.write_text(log.read_text()[:-30])
    list(lifecycle.resume(remains))
    assert_the_same_end(remains, never)


def test_no_checkpoint_that_is_whole_is_an_error_that_names_them(remains):
    for path in (remains / "checkpoints").glob("*.safetensors"):
        cut(path)
    with pytest.raises(FedtriError, match=r"no checkpoint is whole: .*00002\.safetensors.*cut short.*00001"):
        list(lifecycle.resume(remains))


def test_a_finished_run_is_not_resumed(never):
    with pytest.raises(FedtriError, match="the run is finished"):
        list(lifecycle.resume(never))


def test_a_run_that_is_running_is_not_resumed(remains):
    with run_directory.locked(remains), pytest.raises(FedtriError, match="in use by a running run"):
        list(lifecycle.resume(remains))


def test_only_the_last_two_checkpoints_and_their_files_are_kept(never):
    names = sorted(path.name for path in (never / "checkpoints").iterdir())
    assert names == ["00003.json", "00003.safetensors", "00004.json", "00004.safetensors"]
    needed = {
        saved["file"] for name in ("00003", "00004")
        for saved in json.loads((never / "checkpoints" / f"{name}.json").read_text())["clients"].values()
    }  # fmt: skip
    assert {str(path.relative_to(never / "clients")) for path in never.glob("clients/*/*")} == needed


def full_state() -> ServerState:
    """Something in every field, keys with odd characters among them."""
    rng = torch.Generator().manual_seed(0)
    keys = [Key("layer.0:x", "A"), Key("layer.0:x", "C"), Key("head.bias", "H")]
    tensors = [torch.randn(2, 3, generator=rng), torch.randn(2, 2, generator=rng).mT, torch.randn((), generator=rng)]
    own = dict(zip(keys, tensors, strict=True))
    double = {keys[1]: tensors[1].double()}
    one, at = np.ones(1, np.float32), np.arange(4, dtype=np.float32)[None]
    nothing = Sketch(np.array([0, 0], np.int32), {})
    said = {"b/é": Sketch(np.array([9, 0], np.int32), {0: Mixture(one, at, at + 1)}), "a": nothing}
    return ServerState(
        round=7, shared=own, personal={"a": double, "b/é": own}, sketches=said,
        deliveries=Deliveries(dict.fromkeys(keys, 6), {"a": 5}, {"a": 7, "b/é": 0}),
        held={"a": Held({}, 6), "b/é": Held(own, 0)},
        own={"moments": {"first": tensors[0], "a/é": {"deep": tensors[1].double()}}, "far": torch.eye(2) * math.nan},
        similarity=Similarity(("b/é", "a"), {"weights": torch.eye(2)}),
    )  # fmt: skip


def test_what_is_loaded_is_what_was_saved(tmp_path):
    """Order of the sketches too: a method's own matrices may go by it. Scales come from the configuration."""
    store, state = ClientStore(tmp_path / "clients"), full_state()
    store.save("a", state.shared, "00007-received")
    checkpoint.save(tmp_path / "checkpoints", state, store, {"round": 7, "loss": 0.25})
    found = checkpoint.load(tmp_path / "checkpoints", tmp_path / "clients")
    assert_same(found.state, state)
    assert list(found.state.sketches) == ["b/é", "a"]
    assert found.line == {"round": 7, "loss": 0.25}
    assert_same(ClientStore(tmp_path / "clients", found.clients).load("a"), state.shared)
    assert checkpoint.load(tmp_path / "nothing", tmp_path / "clients") is None


def test_every_field_of_the_servers_state_is_saved_or_comes_from_the_configuration(tmp_path):
    """What `full_state` leaves at its default would not be noticed missing."""
    empty, state = ServerState(), full_state()
    same = {name for name in vars(state) if repr(getattr(state, name)) == repr(getattr(empty, name))}
    assert same == {"scales"}


def test_a_file_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    """Seen to fail with the bytes written straight to the name they are read by."""
    atomic.write_bytes(tmp_path / "file", b"old")
    monkeypatch.setattr("fedtri.atomic.os.fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        atomic.write_bytes(tmp_path / "file", b"new and longer")
    assert (tmp_path / "file").read_bytes() == b"old"


def test_a_client_is_as_it_was_last_saved_whatever_is_on_the_disk(tmp_path):
    store = ClientStore(tmp_path)
    own = {Key("l", "A"): torch.zeros(2, 3)}
    store.save("a", own, "1")
    as_of_now = dict(store.current)
    store.save("a", {Key("l", "A"): torch.ones(2, 3)}, "2")
    assert_same(ClientStore(tmp_path, as_of_now).load("a"), own)
    assert ClientStore(tmp_path).load("a") is None
    forged = {"a": replace(as_of_now["a"], digest="0" * 64)}
    with pytest.raises(FedtriError, match="cut short or changed"):
        ClientStore(tmp_path, forged).load("a")
