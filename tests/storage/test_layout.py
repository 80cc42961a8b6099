"""A run directory or a checkpoint that another version of fedtri wrote is refused in one line, by everything that reads
one. Seen to fail with the layout's version not compared: an unknown key, or a KeyError, was what users saw.
"""

import hashlib
import json
from pathlib import Path

import pytest

from fedtri import config
from fedtri.deploy import coordinator, terms
from fedtri.errors import FedtriError
from fedtri.report import reading
from fedtri.runs import compare, finished, lifecycle
from fedtri.storage import checkpoint, run_directory

CONFIG = """
model = "minilm"
data = "digits"
method = "fedit"
clients = 2
rounds = 2

[simulation]
cohort = 16
"""
"""As the first version wrote it: the group of clients had another name."""
LINE = {"round": 1, "clients": ["a"], "loss": 1.0, "accuracy": None, "accuracy_local": None, "test_loss": None,
        "test_loss_local": None, "bytes": {"up": {}, "down": {}}, "seconds": {}}  # fmt: skip


@pytest.fixture
def old(tmp_path) -> Path:
    """A run directory of the first version, made by hand."""
    folder = tmp_path / "old"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "clients").mkdir()
    (folder / "config.toml").write_text(CONFIG)
    (folder / "environment.json").write_text('{"threads": 1, "seed": 0, "device": "cpu"}')
    (folder / "labels.json").write_text('["x", "y"]')
    (folder / "rounds.jsonl").write_text(json.dumps(LINE) + "\n")
    (folder / "summary.json").write_text("{}")
    manifest = {"round": 1, "line": LINE, "server": {"file": "00001.safetensors", "digest": ""}, "clients": {},
                "changed": {}, "changed_personal": {}, "delivered": {}, "sketches": []}  # fmt: skip
    digest = hashlib.sha256(json.dumps(manifest).encode()).hexdigest()
    (folder / "checkpoints" / "00001.json").write_text(json.dumps({**manifest, "digest": digest}))
    return folder


def again(folder: Path) -> None:
    """The comparison that this run belongs to, called again."""
    member = compare.Member(folder.name, config.load(None, ["method=fedit"]), "fedit")
    (folder.parent / reading.COMPARISON).write_text("{}")
    list(compare.run(compare.Plan(folder.parent, (member,), (), "fedit")))


def led(folder: Path) -> None:
    """A server that goes on with it."""
    network = {"clients": ["a", "b"], "labels": ["x", "y"]}
    asked = config.validated({"method": "fedit", "out": str(folder), "network": network})
    with coordinator.opened(asked, terms.agreed(asked)):
        pass


READERS = {
    "resume": lambda folder: list(lifecycle.resume(folder)),
    "show": run_directory.read_summary,
    "export": lambda folder: finished.export(folder, "a", folder / "to"),
    "predict": lambda folder: finished.predict(folder, "a", ["text"]),
    "evaluate": finished.evaluate,
    "report": reading.load,
    "compare": again,
    "network": led,
}


@pytest.mark.parametrize("read", READERS.values(), ids=READERS.keys())
def test_a_run_of_the_first_version_is_refused(read, old):
    with pytest.raises(FedtriError) as refused:
        read(old)
    assert str(refused.value) == (
        f"{old}: the run directory has layout 1, expected {run_directory.LAYOUT}: another version of fedtri wrote it; "
        "read it with that version, or start the run anew"
    )


def test_a_checkpoint_of_the_first_version_is_refused(old):
    """Not taken for a damaged one, for which the one before it would do."""
    with pytest.raises(FedtriError, match=r"^\S*00001\.json: the checkpoint has layout 1, expected 3: another version"):
        checkpoint.load(old / "checkpoints", old / "clients")
