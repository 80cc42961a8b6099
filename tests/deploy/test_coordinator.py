"""Laws of the server's half of a network run: what a client does wrong is named, and the others' run goes on."""

import json
import math
import re
import shutil
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from deploy.grid import CLIENTS, Grid, Record, Sites, codec_of
from fedtri.adapters.layout import Factors, Key
from fedtri.communication import framing
from fedtri.communication.flower_calls import BODY, FAILED, Called
from fedtri.deploy import coordinator, site
from fedtri.deploy.journal import Journal
from fedtri.errors import FedtriError
from fedtri.messages import Request
from fedtri.testing.compare import assert_same

BAD = "b"
NUMBERS = struct.calcsize("<2sBBI8s8sIII")
"""Where the header says how many bytes of numbers there are."""


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "run" / "rounds.jsonl").read_text().splitlines()]


def sent_again(change: Callable[[Factors, site.Opened], Factors]) -> Callable:
    """A client that seals other factors as its own."""

    def answer(call: Called, opened: site.Opened, record: Record) -> list[Record]:
        codec, request = codec_of(opened, call), Request("train", round_of(call), BAD, {})
        said = codec.read_reply(record[BODY], request)
        changed = replace(said, up=change(said.up, opened))
        return [{BODY: codec.write_reply(changed, request, opened.site.store)}]

    return answer


def round_of(call: Called) -> int:
    return framing.phase_and_round(call.data)[1]


def altered(change: Callable[[bytes], bytes]) -> Callable:
    """A client whose buffer is changed on its way."""
    return lambda call, opened, record: [{BODY: change(record[BODY])}]


def terabytes(data: bytes) -> bytes:
    return data[:NUMBERS] + struct.pack("<Q", 1 << 42) + data[NUMBERS + 8 :]


def cut(factors: Factors, _: site.Opened) -> Factors:
    return {key: value[:, :-1] if key.factor == "A" else value for key, value in factors.items()}


def other_method(factors: Factors, opened: site.Opened) -> Factors:
    return {Key(layer.name, "C"): torch.eye(3) for layer in opened.spec.layout.layers}


class Replayed:
    """A client that answers with what it has answered a round ago."""

    def __init__(self) -> None:
        self.last: Record = {}

    def __call__(self, call: Called, opened: site.Opened, record: Record) -> list[Record]:
        before, self.last = self.last, record
        return [before or record]


def unheard(call: Called, opened: site.Opened, record: Record) -> list[Record]:
    return []


HOSTILE: dict[str, tuple[Callable, str, str]] = {
    "NaN": (sent_again(lambda f, _: {k: v * math.nan for k, v in f.items()}), "refused", "norm nan"),
    "too large": (sent_again(lambda f, _: {k: v + 1e6 for k, v in f.items()}), "refused", "a finite one up to"),
    "wrong shape": (sent_again(cut), "refused", r"has shape \(3, 15\), expected \(3, 16\)"),
    "another method's factors": (sent_again(other_method), "refused", "expected that it does not travel"),
    "a tensor missing": (sent_again(lambda f, _: dict(list(f.items())[1:])), "refused", "1 expected tensors are mis"),
    "a header of terabytes": (altered(terabytes), "refused", "it was cut or altered"),
    "cut short": (altered(lambda data: data[:-7]), "refused", "it was cut or altered"),
    "one bit turned": (altered(lambda data: data[:-1] + bytes([data[-1] ^ 1])), "refused", "checksum does not match"),
    "too long": (altered(lambda data: data + bytes(1 << 20)), "refused", "expected at most [0-9]+ bytes, got 10"),
    "nothing": (lambda *_: [{}], "refused", "holds no buffer"),
    "text": (lambda *_: [{BODY: "<script>"}], "refused", "holds no buffer"),
    "a forged stage": (lambda *_: [{FAILED: "<script>alert()</script>"}], "refused", "holds no buffer"),
    "what Flower cannot read": (lambda *_: [ValueError("secret")], "refused", r"Flower cannot read \(ValueError\)$"),
    "two answers": (lambda call, opened, record: [record, record], "refused", "answered twice"),
    "a failure": (lambda *_: [{FAILED: "reading its data"}], "failed", "failed while reading its data; the reason"),
    "no answer": (unheard, "failed", "no answer within 1 s"),
}  # fmt: skip


@pytest.fixture(scope="module")
def misled(lab, tmp_path_factory) -> tuple[Path, Grid]:
    """A run of FedIT in whose every round but the first client b does something else that is wrong."""
    sites = Sites(tmp_path_factory.mktemp("hostile"), lab)
    grid = Grid(sites)
    scripts = iter([None, *(script for script, *_ in HOSTILE.values())])
    replayed = Replayed()

    def scripted(call: Called, opened: site.Opened, record: Record) -> list:
        if framing.phase_and_round(call.data)[0] == "evaluate":
            return [record]
        if (script := next(scripts, replayed)) is None:
            replayed(call, opened, record)
            return [record]
        return script(call, opened, record)

    grid.scripts[BAD] = scripted
    path = sites.configure(method="fedit", rounds=len(HOSTILE) + 2, network={"retries": 0})
    coordinator.lead(path, grid, {})
    return sites.folder, grid


@pytest.mark.parametrize("number", range(len(HOSTILE)), ids=list(HOSTILE))
def test_what_a_client_does_wrong_is_named_and_the_others_round_goes_on(misled, number):
    folder, _ = misled
    name, (_, kind, why) = list(HOSTILE.items())[number]
    line = lines(folder)[number + 1]
    said = line["refused"] if kind == "refused" else list(line["failed"].values())
    assert len(said) == 1
    assert said[0].startswith(f"{BAD}: ")
    assert re.search(why, said[0]), said
    assert set(line["bytes"]["up"]) >= set(CLIENTS) - {BAD}
    assert said[0].removeprefix(f"{BAD}: ") in (folder / "run" / "run.log").read_text(), name


def test_the_answer_to_an_old_round_is_refused(misled):
    folder, _ = misled
    (said,) = lines(folder)[-1]["refused"]
    assert re.fullmatch(
        rf"{BAD}: wire: the reply is to train of round 1, expected train of round {len(HOSTILE) + 2}", said
    )


def test_the_report_names_what_went_wrong(misled):
    folder, _ = misled
    page = (folder / "run" / "report.html").read_text()
    assert "no answer within 1 s" in page
    assert "norm nan" in page


def test_the_run_ends_with_a_summary_like_any_other(misled):
    folder, _ = misled
    said = json.loads((folder / "run" / "summary.json").read_text())
    assert (said["rounds"], said["clients"], said["method"]) == (len(HOSTILE) + 2, 4, "fedit")
    assert said["bytes"]["up_per_client_round"] > said["bytes"]["payload_up_per_client_round"] > 0


def test_another_clients_answer_is_refused(lab, tmp_path):
    """b sends what a has sent: the seal is a's."""
    sites = Sites(tmp_path, lab)
    grid, heard = Grid(sites), {}

    def listening(call: Called, opened: site.Opened, record: Record) -> list[Record]:
        heard.update(record)
        return [record]

    grid.scripts = {"a": listening, BAD: lambda *_: [dict(heard)]}
    coordinator.lead(sites.configure(method="fedit", rounds=1, network={"retries": 0}), grid, {})
    assert "another model, head, targets, configuration, run or client" in lines(tmp_path)[0]["refused"][0]


def test_clients_join_and_leave_between_rounds(lab, tmp_path):
    """d is there from the second round on, with cores mixed by its sketch alone; b is gone from the third on."""
    sites = Sites(tmp_path, lab)
    grid, received = Grid(sites, offline={"d"}), {}

    def noting(call: Called, opened: site.Opened, record: Record) -> list[Record]:
        said = codec_of(opened, call).open_request(call.data, call.client)
        if said.phase == "train":
            received[call.client, said.round] = said.factors
            grid.offline = [{"d"}, set(), {"b"}][min(said.round + 1, 2)]
        return [record]

    grid.scripts = {"a": noting, "d": noting}
    coordinator.lead(sites.configure(method="ce_lora", rounds=3, steps=2), grid, {})  # in one step no core moves: B = 0
    found = lines(tmp_path)
    assert [line["clients"] for line in found] == [["a", "b", "c"], CLIENTS, ["a", "c", "d"]]
    assert [sorted(line["bytes"].get("sketch", {})) for line in found] == [["a", "b", "c"], ["d"], []]
    assert not any(line.get("failed") or line.get("refused") for line in found)
    assert not received["a", 0]
    assert received["d", 1]
    assert all(not torch.equal(core, torch.eye(3)) for core in received["d", 1].values())


@pytest.mark.parametrize("number", ["float32", "int4"])
def test_who_answers_too_late_is_as_one_that_was_away(number, lab, tmp_path):
    """b trains in the second round, but nobody hears of it. Seen to fail with what b then kept of that round."""
    kept = {}
    for how in ("late", "away"):
        sites = Sites(tmp_path / how, lab)
        grid = Grid(sites)

        def late(call: Called, opened: site.Opened, record: Record) -> list[Record]:
            return [] if framing.phase_and_round(call.data) == ("train", 1) else [record]

        def leaves(call: Called, opened: site.Opened, record: Record, grid: Grid = grid) -> list[Record]:
            phase, round = framing.phase_and_round(call.data)
            if phase == "train":
                grid.offline = {BAD} if round == 0 else set()
            return [record]

        grid.scripts = {BAD: late} if how == "late" else {"d": leaves}
        values = {"rounds": 3, "wire": {"up": number, "down": number}, "network": {"retries": 0}}
        coordinator.lead(sites.configure(method="ce_lora", steps=2, **values), grid, {})
        folders = {client: next((tmp_path / how / client / "state" / "runs").iterdir()) for client in CLIENTS}
        kept[how] = {client: Journal(folder).newest().load(client) for client, folder in folders.items()}
    assert_same(kept["late"], kept["away"])


def test_a_client_that_failed_is_asked_again(lab, tmp_path):
    sites = Sites(tmp_path, lab)
    grid, tries = Grid(sites), []

    def once(call: Called, opened: site.Opened, record: Record) -> list[Record]:
        tries.append(record)
        return [{FAILED: "at work on train"} if len(tries) == 1 else record]

    grid.scripts = {BAD: once}
    coordinator.lead(sites.configure(method="fedit", rounds=1, network={"deadline": 60.0}), grid, {})
    (line,) = lines(tmp_path)
    assert line["retries"] == {BAD: 1}
    assert "failed" not in line
    assert BAD in line["bytes"]["up"]


def test_a_round_without_a_quorum_is_tried_again_and_then_the_run_stops(lab, tmp_path):
    sites = Sites(tmp_path, lab)
    grid = Grid(sites, scripts=dict.fromkeys(CLIENTS[1:], lambda *_: [{}]))
    path = sites.configure(method="fedit", network={"attempts": 2, "minimum": 3})
    with pytest.raises(FedtriError, match=r"^round 1: 1 replies can be used, expected at least 3; b: wire"):
        coordinator.lead(path, grid, {})


def test_too_few_clients_online_stop_the_run_with_what_to_do(lab, tmp_path):
    sites = Sites(tmp_path, lab)
    grid = Grid(sites, offline={"a", "b", "c"})
    with pytest.raises(FedtriError, match="1 of 4 clients are online after 1 s, expected at least 2"):
        coordinator.lead(sites.configure(method="fedit"), grid, {})


def test_clients_with_classes_of_their_own_are_refused(lab, tmp_path):
    sites = Sites(tmp_path, lab)
    with pytest.raises(FedtriError, match='labels: "own" exists in one process only; leave it out'):
        coordinator.lead(sites.configure(method="fedit", labels="own"), Grid(sites), {})


def test_a_method_that_needs_everyones_data_in_one_place_is_refused(lab, tmp_path):
    sites = Sites(tmp_path, lab)
    with pytest.raises(FedtriError, match="centralized trains on everyone's data in one place"):
        coordinator.lead(sites.configure(method="centralized"), Grid(sites), {})


def test_the_last_layers_alone_and_early_stopping_are_for_both_ends(lab, tmp_path):
    """Seen to fail with `layers` left out of the server's layout: every reply was of another model."""
    sites = Sites(tmp_path, lab)
    path = sites.configure(
        method="fedit", layers="last:1", early_stopping={"patience": 1}, rounds=2, evaluate=True,
        wire={"up": "int8"}, network={"deadline": 60.0},
    )  # fmt: skip
    coordinator.lead(path, Grid(sites), {})
    found = lines(tmp_path)
    assert not any(line.get("failed") or line.get("refused") for line in found)
    assert all(line["validation_loss"] > 0 for line in found)


@pytest.mark.parametrize("number", ["float32", "sign"])
def test_a_site_that_has_lost_its_disk_is_sent_all_it_needs(number, lab, tmp_path):
    """b's folder is empty after the first round; it takes part in the second as if it had never been away.

    RoLoRA: what b lacks did not all change in the last round. Seen to fail with what has changed alone.
    """
    sites = Sites(tmp_path, lab)
    grid, down = Grid(sites), {}

    def noting(call: Called, opened: site.Opened, record: Record) -> list[Record]:
        said = codec_of(opened, call).open_request(call.data, call.client)
        down[said.phase, said.round] = set(said.factors)
        if (said.phase, said.round) == ("evaluate", 1):
            shutil.rmtree(Path(opened.node.state) / "runs")
        return [record]

    grid.scripts = {BAD: noting}
    values = {"rounds": 3, "evaluate": True, "wire": {"up": number, "down": number}, "network": {"deadline": 60.0}}
    coordinator.lead(sites.configure(method="rolora", head="personal", **values), grid, {})
    found = lines(tmp_path)
    assert not any(line.get("failed") or line.get("refused") for line in found)
    assert [line.get("retries") for line in found] == [None, {BAD: 1}, None]
    assert {key.factor for key in down["train", 1]} == {"B"}
    assert {key.factor for key in down["evaluate", 2]} == {"A"}
    assert "b: has lost what it was sent before, and is sent all it needs" in (tmp_path / "run" / "run.log").read_text()


def test_a_site_without_validation_examples_says_so_where_early_stopping_needs_them(lab, tmp_path, caplog):
    sites = Sites(tmp_path, lab)
    few = {"train": 0.79, "validation": 0.01, "test": 0.2}
    path = sites.configure(method="fedit", early_stopping={"patience": 1}, split=few, network={"attempts": 1})
    with pytest.raises(FedtriError, match=r"a: failed while reading its data; the reason is in the site's own log"):
        coordinator.lead(path, Grid(sites), {})
    assert "early_stopping.patience: needs validation examples" in caplog.text


def test_a_basis_from_gradients_goes_over_the_network(lab, tmp_path):
    """Every site's gradient before the first round; d, which joins later, is sent the basis with its first task."""
    sites = Sites(tmp_path, lab)
    grid, received = Grid(sites, offline={"d"}), {}

    def noting(call: Called, opened: site.Opened, record: Record) -> list[Record]:
        said = codec_of(opened, call).open_request(call.data, call.client)
        received[call.client, said.phase, said.round] = said.factors
        if said.phase == "train":
            grid.offline = set()
        return [record]

    grid.scripts = dict.fromkeys(CLIENTS, noting)
    coordinator.lead(sites.configure(method="gradient_core", rounds=2), grid, {})
    found = lines(tmp_path)
    assert [sorted(line["bytes"].get("basis", {})) for line in found] == [["a", "b", "c"], []]
    assert not any(line.get("failed") or line.get("refused") for line in found)
    a, d = received["a", "train", 0], received["d", "train", 1]
    assert {key.factor for key in a} == {"A", "B"}
    assert {key.factor for key in d} == {"A", "B", "C"}
    assert all(torch.equal(d[key], value) for key, value in a.items())
