"""A basis from gradients: asked for once, before the first round, and everyone's from then on."""

import json
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

from fedtri import methods
from fedtri.adapters.layout import Factors, Key
from fedtri.aggregation import means
from fedtri.communication.in_process import LocalTransport
from fedtri.errors import FedtriError
from fedtri.federation import server
from fedtri.messages import Answer, Failure, Request
from fedtri.runs import lifecycle
from fedtri.runs.simulation import Federation
from fedtri.state import ServerState
from tiny import assert_same, clients_tensors, rounds

METHODS = ["fed_sb", "ffa_lora", "fedit", "ce_lora"]


class Listening(LocalTransport):
    """Notes each request with its answer; clients in `deaf` do not answer where they are asked for a gradient."""

    heard: list[tuple[Request, Answer | Failure]]
    deaf: set[str]

    def exchange(self, requests: Sequence[Request]) -> list[Answer | Failure]:
        found = super().exchange(requests)
        for place, request in enumerate(requests):
            if request.phase == "basis" and request.client in self.deaf:
                found[place] = Failure(request.client, f"{request.client}: is late")
        self.heard.extend(zip(requests, found, strict=True))
        return found


def listening(built: Federation, *deaf: str) -> Federation:
    transport = Listening(built.site, built.spec.codec)
    transport.__dict__.update(heard=[], deaf=set(deaf))
    return replace(built, transport=transport)


def phases(built: Federation) -> list[tuple[int, str]]:
    return [(request.round, request.phase) for request, _ in built.transport.heard]  # pyright: ignore


@pytest.mark.parametrize("method", METHODS)
def test_clients_start_from_the_pooled_basis_and_later_ones_too(method, lab, tmp_path):
    """Half of the clients a round: all are asked for their gradients once, and each is sent the basis with what it is
    first sent. Seen to fail with what was shared in round 0 never sent, and with the phase in every round."""
    frozen = {"method_options": {"frozen": True}} if method == "ce_lora" else {}
    built = listening(
        lab.federation(tmp_path, method=method, basis="gradient", fraction=0.5, rounds=4, seed=3, **frozen)
    )
    played = list(rounds(built))
    wanted = built.method.adapter.from_basis
    assert wanted == (frozenset("AB") if method in ("fed_sb", "ce_lora") else frozenset("A"))
    asked = [place for place in phases(built) if place[1] == "basis"]
    assert asked == [(0, "basis")] * 4
    assert phases(built)[:4] == asked
    first: dict[str, Factors] = {}
    for request, _ in built.transport.heard:  # pyright: ignore
        if request.phase != "basis" and request.down:
            first.setdefault(request.client, request.down)
    assert len(first) == 4
    for down in first.values():
        assert set(built.spec.layout.keys(wanted)) <= set(down)
    if "A" not in built.method.plan(0).train:
        shared = played[-1].state.shared
        for own in clients_tensors(built).values():
            for key in built.spec.layout.keys(wanted):
                assert torch.equal(own[key], shared[key])
    line = played[0].line
    assert line["bytes"]["basis"].keys() == first.keys()
    assert line["seconds"]["basis"] > 0
    assert all("basis" not in progress.line["bytes"] for progress in played[1:])


def test_the_basis_is_that_of_the_mean_of_the_clients_dense_gradients(lab, tmp_path):
    """End to end in float64, with as many factors as a layer has. Seen to fail with gradients at trained heads, and
    with all clients weighing alike."""
    built = lab.federation(
        tmp_path, method="fed_sb", basis="gradient", basis_factors=16, rank=16, targets="query", double=True, rounds=1
    )
    site = built.site
    keep = lambda dense: {Key(name, "W"): value.clone() for name, value in dense.items()}  # noqa: E731
    models = [site.model(client, site.initial(client)) for client in site.clients]
    dense = site.executor.gradients(models, [np.sort(site.splits[c].train) for c in site.clients], [keep] * 4)
    trained = {k: 3.0 * v if k.factor == "H" else v for k, v in site.initial("client-00").items()}
    site.store.save("client-00", trained, "00000-trained")
    (only,) = rounds(built)
    sizes = torch.tensor([len(site.splits[c].train) for c in site.clients], dtype=torch.float64)
    for layer in built.spec.layout.layers:
        mean = sum(w * one[Key(layer.name, "W")] for w, one in zip((sizes / sizes.sum()).tolist(), dense, strict=True))
        assert isinstance(mean, torch.Tensor)
        U, S, Vh = torch.linalg.svd(mean)
        A, B = (only.state.shared[Key(layer.name, factor)] for factor in "AB")
        projected = (B.mT @ mean @ A.mT).diagonal()
        torch.testing.assert_close(projected, S, atol=1e-9, rtol=0)
        assert U.shape == B.shape
        assert Vh.shape == A.shape


def test_the_order_of_replies_changes_nothing(lab, tmp_path):
    """Seen to fail with the replies summed as they came."""
    built = listening(lab.federation(tmp_path, method="fed_sb", basis="gradient", rounds=1))
    list(rounds(built))
    replies = [answer.reply for request, answer in built.transport.heard if request.phase == "basis"]  # pyright: ignore
    state = ServerState(scales=built.spec.scales)
    expected = server.based(built.method, state, replies)
    assert_same(server.based(built.method, state, replies[::-1]), expected)


def test_clients_that_do_not_answer_are_done_without_or_waited_for(lab, tmp_path):
    """Three of four are enough where the quorum is three, not where it is four. Those that were late get the basis."""
    built = listening(lab.federation(tmp_path / "a", method="fed_sb", basis="gradient"), "client-01")
    first, *_ = rounds(built, quorum=3)
    assert first.line["failed"] == {"client-01": "client-01: is late"}
    own = clients_tensors(built)
    key = built.spec.layout.keys(frozenset("A"))[0]
    assert torch.equal(own["client-01"][key], own["client-00"][key])
    built = listening(lab.federation(tmp_path / "b", method="fed_sb", basis="gradient"), "client-01")
    with pytest.raises(FedtriError, match="round 1: 3 replies can be used, expected at least 4; client-01: is late"):
        list(rounds(built, quorum=4, attempts=2))
    assert phases(built) == [(0, "basis")] * 8


def test_a_run_says_what_its_basis_cost(lab, tmp_path):
    """The bytes up of the phase beside those of the rounds, and in the total; its seconds among the stages."""
    settings = {"method": "fed_sb", "basis": "gradient", "basis_factors": 1, "out": str(tmp_path / "run")}
    list(lifecycle.run(lab.config(**settings)))
    said = json.loads((tmp_path / "run" / "summary.json").read_text())
    lines = [json.loads(line) for line in (tmp_path / "run" / "rounds.jsonl").read_text().splitlines()]
    numbers = 2 * (16 + 16) + 2 * (16 + 24)  # one factor of A and B of two 16 x 16 and two 24 x 16 layers
    assert 4 * numbers < said["bytes"]["basis_per_client"] < 4 * numbers + 200
    ways = [line["bytes"] for line in lines]
    assert said["bytes"]["total"] == sum(sum(table.values()) for way in ways for table in way.values())
    assert said["seconds"]["basis"] == pytest.approx(lines[0]["seconds"]["basis"], abs=1e-3)
    assert said["seconds"]["basis"] > 0


def test_a_sketch_that_is_no_gradient_is_refused(lab, tmp_path, monkeypatch):
    """A client cannot send more factors than it should, or numbers that are none."""
    built = lab.federation(tmp_path, method="fed_sb", basis="gradient", basis_factors=2)
    codec, request = built.spec.codec, Request("basis", 0, "client-00", {})
    (answer, *_) = built.transport.exchange([request])
    assert isinstance(answer, Answer)
    assert {tuple(v.shape) for k, v in answer.reply.up.items() if k.factor == "A"} == {(2, 16)}
    long = {k: torch.cat([v, v], 0 if k.factor == "A" else 1) for k, v in answer.reply.up.items()}
    bad = {k: v * torch.nan for k, v in answer.reply.up.items()}
    for up, why in ((long, "has shape"), (bad, "norm nan")):
        data = codec.write_reply(replace(answer.reply, up=up), request, built.site.store)
        with pytest.raises(FedtriError, match=why):
            codec.read_reply(data, request)


@pytest.mark.parametrize(
    ("method", "basis", "said"),
    [
        ("full", "gradient", "basis: full cannot use 'gradient'; it has no adapter, or a method of "),
        ("flora", "weights", "basis: flora cannot use 'weights'; expected default or kaiming, orthonormal, or "),
        ("local", "gradient", "basis: local cannot use 'gradient'; expected default or kaiming, orthonormal, weights"),
        ("centralized", "gradient", "basis: centralized cannot use 'gradient'; "),
    ],
)
def test_a_basis_that_a_method_cannot_use_is_refused(method, basis, said):
    with pytest.raises(FedtriError) as caught:
        methods.build(method, basis=basis)
    assert str(caught.value).startswith(said)
    assert "\n" not in str(caught.value)


def test_smaller_ranks_get_the_first_vectors(lab, tmp_path):
    """FlexLoRA's clients of rank 1 and 3 start from the first rows of one basis."""
    built = listening(lab.federation(tmp_path, method="flexlora", basis="gradient", rank=[1, 3, 2, 3]))
    list(rounds(built, rounds=1))
    starts = {r.client: r.down for r, _ in built.transport.heard if r.phase == "train"}  # pyright: ignore
    for key in built.spec.layout.keys(frozenset("A")):
        for client, rank in (("client-00", 1), ("client-02", 2)):
            assert torch.equal(starts[client][key], starts["client-01"][key][:rank])


def test_what_is_shared_before_the_first_round_is_sent_to_whoever_was_sent_nothing():
    """Round 0 is a round. Seen to fail with a client that has nothing taken for one that has the state of round 0."""
    method = methods.build("fed_sb", basis="gradient")
    key = Key("w", "A")
    state = means.share(ServerState(), {key: torch.ones(1, 2)})
    assert set(server.downlink(method, state, "a")) == {key}
    assert not server.downlink(method, server.delivered(state, ["a"]), "a")
