"""The fast executor gives what the reference gives: every architecture of its table, task, and kind of adapter."""

import pytest
from clients import ENCODERS, adapted, client, examples, executor, run

from fedtri.execution.fast.table import ARCHITECTURES
from tiny import assert_same

TOLERANCE = {"atol": 1e-9, "rtol": 1e-9}


def same(on, task="classify", clients=None, held=None, **more):
    """Both executors' results of three clients of ranks 3, 1 and 2."""
    held = held if held is not None else examples(task)
    clients = clients or [client(on, n, rank) for n, rank in enumerate((3, 1, 2))]
    how = {key: more.pop(key) for key in ("how", "learns", "proximal", "towards") if key in more}
    fast = executor(on, task, examples=held, **more)
    assert "fast" in fast.describe()
    found = run(fast, clients, **how)
    plain = run(executor(on, task, "reference", examples=held), clients, **how)
    assert_same(found, plain, **TOLERANCE)
    return found


@pytest.mark.parametrize("kind", sorted(ARCHITECTURES))
@pytest.mark.parametrize("task", ["classify", "tag", "continue"])
def test_every_architecture_and_task(kind, task):
    if (kind == "mpnet" and task == "continue") or (kind in ENCODERS and task == "continue"):
        pytest.skip("an encoder continues no text")
    if kind == "gemma" and task == "tag":
        pass
    same(adapted(kind, task), task)
