"""FedAvgM and FedAdam by hand-sized numbers, resumed bit for bit, refused where what is shared is no average."""

import pytest
import torch

from fedtri.adapters.layout import Key
from fedtri.aggregation import server_optimizers
from fedtri.errors import FedtriError
from fedtri.state import Deliveries, ServerState
from fedtri.storage import checkpoint
from fedtri.storage.client_store import ClientStore
from tiny import assert_same, rounds

KEY = Key("w", "A")


def moved(step, *averages: float) -> list[float]:
    """What is shared after each round, where the clients' averages are these numbers."""
    state, seen = ServerState(), []
    for round, average in enumerate(averages, 1):
        after = state.with_(round=round, shared={KEY: torch.tensor([average])}, deliveries=Deliveries({KEY: round}))
        state = step(state, after)
        seen.append(float(state.shared[KEY]))
    return seen


def test_fedavgm_adds_half_of_the_last_move():
    """Round 2 moves by 1; round 3 by 1 and half of that; where averages are of what was shared."""
    step = server_optimizers.optimizer("fedavgm", learning_rate=1.0, betas=(0.5, 0.0))
    assert moved(step, 0.0, 1.0, 2.0) == [0.0, 1.0, 2.5]


def test_fedavgm_without_momentum_is_the_average():
    assert moved(server_optimizers.optimizer("fedavgm", learning_rate=1.0, betas=(0.0, 0.0)), 3.0, 1.0, 7.0) == [
        3.0,
        1.0,
        7.0,
    ]


def test_fedadam_moves_by_the_learning_rate():
    """With β = 0, m = Δ and √v = |Δ|: the step is η |Δ| / (|Δ| + τ), in Δ's direction."""
    step = server_optimizers.optimizer("fedadam", learning_rate=0.1, betas=(0.0, 0.0))
    assert moved(step, 0.0, 4.0)[-1] == pytest.approx(0.1 * 4 / (4 + server_optimizers.TAU))
    assert moved(step, 0.0, -4.0)[-1] == pytest.approx(-0.1 * 4 / (4 + server_optimizers.TAU))


@pytest.mark.parametrize("name", ["fedavgm", "fedadam"])
def test_its_memory_survives_a_checkpoint(lab, tmp_path, name):
    built = lab.federation(tmp_path / "clients", method="rolora", server__optimizer=name)
    *_, last = rounds(built, rounds=3)
    assert last.state.own[server_optimizers.MOMENTS]["first"]
    checkpoint.save(tmp_path / "checkpoints", last.state, built.site.store, {})
    found = checkpoint.load(tmp_path / "checkpoints", tmp_path / "clients")
    assert found is not None
    assert_same(found.state.own, last.state.own)
    assert isinstance(built.site.store, ClientStore)


@pytest.mark.parametrize("method", ["flexlora", "flora", "ce_lora", "local", "hetlora"])
def test_it_is_refused_where_no_average_is_shared(lab, tmp_path, method):
    with pytest.raises(FedtriError, match=r"server.optimizer: .* shares no plain average"):
        lab.federation(tmp_path, method=method, server__optimizer="fedavgm")
