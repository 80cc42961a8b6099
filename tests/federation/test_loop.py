"""Laws of the round loop: who is asked when, when it stops, what a line says; a bad client spoils nobody's round."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import pytest
import torch

from fedtri import methods
from fedtri.adapters.layout import Key, Layer, Layout
from fedtri.communication import in_process as local
from fedtri.errors import FedtriError
from fedtri.federation import loop
from fedtri.federation.client import Site
from fedtri.messages import Answer, Failure, Reply, Request
from fedtri.metrics import spread
from fedtri.runs import lifecycle
from fedtri.state import Scales
from tiny import assert_same, clients_tensors, effective, rounds

LAYOUT = Layout((Layer("one", 3, 2),), ())
CLIENTS = ["a", "b", "c", "d"]
SCALES = Scales(2.0, dict.fromkeys(CLIENTS, 2))


@dataclass
class Scripted:
    """A transport whose clients answer by a script: the validation loss of each round."""

    validation: Sequence[float] = ()
    asked: list[tuple[int, str, str]] = field(default_factory=list)

    def clients(self) -> list[str]:
        return CLIENTS

    def exchange(self, requests: Sequence[Request]) -> list[Answer]:
        """Answers in the reverse order of the requests: 5 bytes up, 7 down."""
        self.asked += [(request.round, request.phase, request.client) for request in requests]
        return [Answer(self.reply(request), 5, 7) for request in reversed(requests)]

    def reply(self, task: Request) -> Reply:
        shapes = LAYOUT.shapes(2)
        up = {k: torch.ones(shapes[k]) for k in LAYOUT.keys(frozenset("AB"))} if task.phase == "train" else {}
        share = CLIENTS.index(task.client) / 4
        scores = {"loss": 1.0, "accuracy": share + (task.phase == "evaluate") / 8}
        if self.validation and task.phase == "evaluate":
            scores["validation_loss"] = float(self.validation[task.round - 1])
        return Reply(task.client, task.round, up, 3, {"train_loss": 1 + share, **scores})


def play(transport: Scripted, **schedule) -> list[loop.Progress]:
    method = methods.build("fedit", head="personal")
    return list(loop.run(method, transport, SCALES, loop.Schedule(**schedule)))


def test_a_round_trains_then_evaluates_and_its_line_says_what_happened():
    transport = Scripted()
    (only,) = play(transport, rounds=1)
    assert [(phase, client) for _, phase, client in transport.asked] == [
        *(("train", c) for c in CLIENTS), *(("evaluate", c) for c in CLIENTS),
    ]  # fmt: skip
    line = only.line
    assert (line["round"], line["clients"], only.round, only.last) == (1, CLIENTS, 1, True)
    assert line["loss"] == (1 + 1.25 + 1.5 + 1.75) / 4
    mine = dict(zip(CLIENTS, (0.125, 0.375, 0.625, 0.875), strict=True))
    assert line["accuracy"] == {"mean": 0.5, "worst": 0.125, "best": 0.875, "clients": mine}
    assert line["accuracy_local"]["mean"] == 0.375
    assert (line["test_loss"]["worst"], line["test_loss"]["best"]) == (1, 1)
    assert line["bytes"] == {"up": dict.fromkeys(CLIENTS, 10), "down": dict.fromkeys(CLIENTS, 14)}
    assert {"train", "aggregate", "evaluate"} <= set(line["seconds"])
    json.dumps(line)


def test_worst_and_best_go_by_what_is_good():
    """Seen to fail with "perplexity_personal" taken for a score of its own."""
    values = {"a": 1.0, "b": 3.0}
    assert spread("accuracy", values) == {"mean": 2, "worst": 1, "best": 3, "clients": values}
    for name in ("loss", "perplexity", "perplexity_personal", "loss_local"):
        low = spread(name, values)
        assert low is not None
        assert (low["worst"], low["best"]) == (3, 1)
    assert spread("accuracy", {}) is None


def test_a_fraction_takes_part_and_everyone_is_scored_at_the_end():
    transport = Scripted()
    lines = [progress.line for progress in play(transport, rounds=6, fraction=0.5, seed=1)]
    assert all(len(line["clients"]) == 2 for line in lines)
    assert len({tuple(line["clients"]) for line in lines}) > 1
    for line in lines[:-1]:
        assert list(line["accuracy"]["clients"]) == line["clients"]
    assert list(lines[-1]["accuracy"]["clients"]) == CLIENTS
    assert lines == [{**p.line, "seconds": line["seconds"]} for line, p in zip(
        lines, play(Scripted(), rounds=6, fraction=0.5, seed=1), strict=True)]  # fmt: skip


STOPS = [
    ([3, 2, 1, 1.5, 1.2, 0], 2, 5),
    ([3, 2, 1, 1.5, 0.9, 1, 1], 2, 7),
    ([1, 1, 1, 1], 1, 2),
    ([4, 3, 2, 1], 1, 4),
    ([3, 2, 1, 1.5, 1.2, 0], None, 6),
]


@pytest.mark.parametrize(("losses", "patience", "stop"), STOPS)
def test_it_stops_when_the_best_validation_loss_lies_patience_rounds_back(losses, patience, stop):
    """Seen to fail with the loss compared to the round before only."""
    played = play(Scripted(losses), rounds=len(losses), patience=patience)
    assert len(played) == stop
    assert [progress.last for progress in played] == [False] * (stop - 1) + [True]
    assert [progress.line["validation_loss"] for progress in played] == losses[:stop]


def test_everyone_is_scored_when_it_stops_early_too():
    played = play(Scripted([1, 1, 1, 1]), rounds=4, fraction=0.5, patience=1)
    assert len(played) == 2
    assert sorted(played[-1].line["accuracy"]["clients"]) == CLIENTS
    assert played[-1].state.deliveries.sent == dict.fromkeys(CLIENTS, 2)


def test_a_stopped_history_is_not_gone_on_with():
    lines = [{"validation_loss": 1.0}, {"validation_loss": 1.0}]
    method = methods.build("fedit", head="personal")
    assert not list(loop.run(method, Scripted(), SCALES, loop.Schedule(9, patience=1), history=lines))


def test_without_evaluation_nobody_is_asked_for_scores_but_what_is_theirs_is_delivered_at_the_end():
    transport = Scripted()
    play(transport, rounds=3, evaluate=False)
    assert [(round, phase) for round, phase, client in transport.asked if client == "a"] == [
        (0, "train"), (1, "train"), (2, "train"), (3, "evaluate"),
    ]  # fmt: skip


def test_a_client_that_diverges_is_refused_and_the_others_round_goes_on(lab, tmp_path, monkeypatch):
    """Through the real transport: its reply holds a NaN, its line says why, nobody else hears of it."""
    built = lab.federation(tmp_path, method="fedit", clients=4)
    first = built.transport.clients()[0]
    real = local.client_update

    def poisoned(site: Site, requests: Sequence[Request]) -> list[Reply]:
        replies = real(site, requests)
        for i, reply in enumerate(replies):
            if reply.client == first and reply.up:
                replies[i] = replace(reply, up={key: value * math.nan for key, value in reply.up.items()})
        return replies

    monkeypatch.setattr(local, "client_update", poisoned)
    last = list(rounds(built))[-1]
    assert len(last.line["refused"]) == 1
    assert last.line["refused"][0].startswith(f"{first}: ")
    assert all(value.isfinite().all() for value in last.state.shared.values())
    assert all(value.isfinite().all() for own in clients_tensors(built).values() for value in own.values())


def test_a_round_of_nothing_but_bad_replies_says_so(lab, tmp_path):
    built = lab.federation(tmp_path, method="fedit", wire__norm_bound=1e-3)
    with pytest.raises(FedtriError, match=r"^round 1: no reply can be used; client-00: .* norm"):
        list(rounds(built))


def test_a_newcomer_gets_a_core_before_it_has_sent_one(lab, tmp_path):
    """Half of the clients a round: who joins later is sent cores mixed by data similarity with its first task."""
    built = lab.federation(tmp_path, method="ce_lora", fraction=0.5, rounds=4, seed=3)
    down: dict[tuple[int, str], set[str]] = {}

    class Listening(local.LocalTransport):
        def exchange(self, requests: Sequence[Request]) -> list[Answer | Failure]:
            asked = [request for request in requests if request.phase == "train"]
            down.update({(one.round, one.client): {key.factor for key in one.down} for one in asked})
            return super().exchange(requests)

    played = list(rounds(replace(built, transport=Listening(built.site, built.spec.codec))))
    joined = {client: min(round for round, c in down if c == client) for _, client in down}
    assert max(joined.values()) > 0
    for client, round in joined.items():
        assert down[round, client] == ({"C"} if round else set())
    assert {c for p in played for c in p.line["bytes"].get("sketch", {})} == set(joined)
    assert all(p.line["bytes"].get("sketch", {}).keys() <= set(p.line["clients"]) for p in played)  # sent once


def test_what_a_client_trains_with_is_its_own_and_what_it_was_sent(lab, tmp_path):
    """After two rounds of FedSA-like sharing everyone's A is one, every B and head its own; C stays I."""
    built = lab.federation(tmp_path, method="fedsa_lora")
    state = list(rounds(built))[-1].state
    own = clients_tensors(built)
    a, b, *_ = own.values()
    layer = built.spec.layout.layers[0].name
    assert torch.equal(a[Key(layer, "A")], b[Key(layer, "A")])
    assert torch.equal(a[Key(layer, "A")], state.shared[Key(layer, "A")])
    assert not torch.equal(a[Key(layer, "B")], b[Key(layer, "B")])
    assert torch.equal(a[Key(layer, "C")], torch.eye(3))
    assert not torch.allclose(effective(a, layer), effective(b, layer))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_number_type_on_the_wire_is_a_setting(dtype, lab, tmp_path):
    built = lab.federation(tmp_path, method="ce_lora", head="personal", wire__up=dtype, rounds=1)
    line = list(rounds(built))[-1].line
    numbers = len(built.spec.layout.layers) * 3 * 3 * (4 if dtype == "float32" else 2)
    up = line["bytes"]["up"]
    assert all(numbers < size < numbers + 600 for size in up.values())  # two answers, each with its metrics


def test_client_seeds_are_of_run_round_and_client(lab, tmp_path):
    """Two clients with the same data learn otherwise, as does one client in two rounds or under two seeds."""
    finals = []
    for name, seed in (("one", 1), ("again", 1), ("other", 2)):
        built = lab.federation(tmp_path / name, method="local", seed=seed, partition="iid", rounds=1)
        same = next(iter(built.site.splits.values()))
        site = replace(built.site, splits=dict.fromkeys(built.site.splits, same))
        list(rounds(replace(built, transport=local.LocalTransport(site, built.spec.codec))))
        finals.append(clients_tensors(built))
    assert_same(finals[0], finals[1])
    layer = built.spec.layout.layers[0].name
    seen = [own[Key(layer, "B")] for final in (finals[0], finals[2]) for own in final.values()]
    assert len({tuple(value.flatten().tolist()) for value in seen}) == 8


def test_a_summary_counts_what_the_lines_count(lab, tmp_path):
    lines = [
        p.line for p in lifecycle.run(lab.config(out=str(tmp_path / "run"), method="ce_lora", rounds=3, fraction=0.5))
    ]
    said = json.loads((tmp_path / "run" / "summary.json").read_text())
    travelled = [line["bytes"] for line in lines]
    assert said["bytes"]["total"] == sum(n for b in travelled for table in b.values() for n in table.values())
    assert said["bytes"]["payload_up_per_client_round"] == 4 * 3 * 3 * 4  # four layers, r = 3
    assert (said["rounds"], said["clients"], said["method"]) == (3, 4, "ce_lora")
    assert said["accuracy"] == lines[-1]["accuracy"]
    assert set(said["accuracy_local"]["clients"]) == {client for line in lines for client in line["clients"]}
