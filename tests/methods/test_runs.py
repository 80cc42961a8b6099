"""Every method runs: two rounds, partial participation, a run directory, on a model with d_in ≠ d_out; mixed ranks."""

import math

import pytest

from fedtri.adapters.layout import Key
from fedtri.aggregation import fidelity
from fedtri.errors import FedtriError
from fedtri.federation import server
from fedtri.messages import POOLED
from fedtri.methods import METHODS, build, networked
from fedtri.runs import lifecycle
from fedtri.runs.spec import client_ranks, method_of
from tiny import NEEDS, clients_tensors, rounds

MIXED = [name for name in METHODS if build(name).adapter.mixed_ranks]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_runs_two_rounds_with_half_of_the_clients(lab, tmp_path, method):
    small = {"clients": 2, "fraction": 0.5, "steps": 1}
    config = lab.config(**(small | {"method": method, "out": str(tmp_path / "run")} | NEEDS.get(method, {})))
    lines = [progress.line for progress in lifecycle.run(config)]
    assert len(lines) == 2
    assert all(math.isfinite(line["loss"]) for line in lines)
    assert (tmp_path / "run" / "summary.json").exists()
    for line in lines:
        for value in (v for table in line.get("rho", {}).values() for v in table.values()):
            assert math.isfinite(value)


def test_without_evaluation_clients_are_scored_after_the_last_round_alone(lab, tmp_path):
    """Seen to fail with a site that scores nothing where `evaluate` is false."""
    built = lab.federation(tmp_path, evaluate=False, fraction=0.5)
    first, last = [progress.line for progress in rounds(built)]
    assert first["accuracy"] is first["accuracy_local"] is last["accuracy_local"] is None
    assert set(last["accuracy"]["clients"]) == set(built.transport.clients())


def test_mixed_ranks_are_taken_by_these_methods_alone():
    assert MIXED == ["flexlora", "hetlora", "raflora", "flora", "flora_na"]


@pytest.mark.parametrize(("method", "rank"), [*((name, [1, 2, 3, 4]) for name in MIXED), ("flora", "uniform:1,4")])
def test_clients_of_mixed_ranks_keep_their_own(lab, tmp_path, method, rank):
    built = lab.federation(tmp_path, method=method, rank=rank)
    assert len(list(rounds(built))) == 2
    layer = built.site.executor.layout.layers[0].name
    for client, factors in clients_tensors(built).items():
        assert factors[Key(layer, "A")].shape[0] == built.site.scales.ranks[client]


def test_the_other_methods_refuse_mixed_ranks_in_one_line(lab):
    for method in (name for name in METHODS if name not in MIXED):
        with pytest.raises(FedtriError, match=rf"rank: {method} needs one rank for all clients"):
            method_of(lab.config(method=method, rank=[1, 2, 3, 4]))


def test_ranks_of_clients():
    clients = [f"c{i}" for i in range(400)]
    assert client_ranks(3, clients[:2], 0) == {"c0": 3, "c1": 3}
    drawn = client_ranks("uniform:4,6", clients, 0)
    assert drawn == client_ranks("uniform:4,6", clients, 0) != client_ranks("uniform:4,6", clients, 1)
    assert all(list(drawn.values()).count(rank) > 90 for rank in (4, 5, 6))
    with pytest.raises(FedtriError, match="expected 2 ranks, one a client, got 3"):
        client_ranks([1, 2, 3], clients[:2], 0)
    with pytest.raises(FedtriError, match="LOW up to HIGH"):
        client_ranks("uniform:6,4", clients, 0)


def test_centralized_trains_on_the_pool_and_scores_every_client(lab, tmp_path):
    built = lab.federation(tmp_path, method="centralized")
    own = [built.site.splits[client].train for client in built.transport.clients()]
    pooled = built.site.splits[POOLED]
    assert sorted(pooled.train) == sorted(row for rows in own for row in rows)
    assert len(pooled.test) == 0
    assert built.site.optimization.steps == 3 * 4
    line = list(rounds(built))[-1].line
    assert set(line["accuracy"]["clients"]) == set(built.transport.clients())
    assert set(line["bytes"]["up"]) == {POOLED} | set(built.transport.clients())
    assert line["accuracy_local"] is None
    with pytest.raises(FedtriError, match="simulation only"):
        networked(built.method)


def test_on_real_updates_flora_na_lies_between_fedit_and_the_best_of_its_rank(lab, tmp_path):
    """ρ against the exact mean, layer by layer, of three ways to combine the very same replies of two rounds."""
    built = lab.federation(tmp_path, method="fedit", learning_rate=0.05)
    state = list(rounds(built, rounds=1))[-1].state
    tasks = server.requests(built.method, state, built.transport.clients(), state.round, "train")
    replies = [answer.reply for answer in built.transport.exchange(tasks)]
    best, na, fedit = (
        fidelity.rho(state, server.server_step(build(name, weights="examples"), state, replies), replies)["exact"]
        for name in ("flexlora", "flora_na", "fedit")
    )
    assert all(best[layer] <= na[layer] * (1 + 1e-5) for layer in best)
    assert all(na[layer] <= fedit[layer] * (1 + 1e-5) for layer in best)
    assert sum(na.values()) < sum(fedit.values())
