"""Laws between messages and bytes: what is read is what was said, fit to be used, for this run and client alone."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from fedtri.adapters.layout import Factors, Key, Layer, Layout
from fedtri.communication.codec import Codec, SketchSize
from fedtri.errors import FedtriError
from fedtri.federation.server import Expectation
from fedtri.messages import Mixture, Reply, Request, Sketch
from fedtri.method import Plan
from fedtri.state import Scales
from fedtri.storage.client_store import ClientStore
from tiny import assert_same

LAYOUT = Layout((Layer("one", 6, 5),), (("head.weight", (3, 5)),))
EXPECTED = Expectation(LAYOUT, Scales(4.0, {"a": 2, "b": 3}), norm_bound=100.0)


def plan(round: int) -> Plan:
    """A and B take turns, as in RoLoRA; after round 5 nothing comes down."""
    turn = "AB"[round % 2]
    return Plan.of("AB", up=turn, down=turn if round < 5 else "")


CODEC = Codec(EXPECTED, plan, sketch=SketchSize(2, 4), fingerprint=b"settings", run=b"run one.")


def some(kinds: str, client: str = "a", seed: int = 0) -> Factors:
    rng = torch.Generator().manual_seed(seed)
    return {key: torch.randn(shape, generator=rng) for key, shape in EXPECTED.shapes(client, frozenset(kinds)).items()}


def reply(up: Factors, round: int = 0, **more) -> Reply:
    return Reply("a", round, up, 7, {"train_loss": 0.5}, **more)


def asked(round: int = 0, phase="train") -> Request:
    return Request(phase, round, "a", {})


def through(codec: Codec, said: Reply, store: ClientStore, request: Request | None = None) -> Reply:
    request = request or asked(said.round)
    return codec.read_reply(codec.write_reply(said, request, store), request)


def test_what_is_read_is_what_was_said(tmp_path):
    request = Request("train", 1, "a", some("B"))
    assert_same(CODEC.read_request(CODEC.write_request(request), "a", ClientStore(tmp_path)), request)
    said = reply(some("A"))
    assert_same(through(CODEC, said, ClientStore(tmp_path)), said)
    one = np.arange(4, dtype=np.float32)
    sketch = Sketch(np.array([3, 0], np.int32), {0: Mixture(np.ones(1, np.float32), one[None], one[None] + 1)})
    said = reply({}, sketch=sketch)
    assert_same(through(CODEC, said, ClientStore(tmp_path), asked(phase="sketch")), said)


@pytest.mark.parametrize(
    ("other", "client"),
    [
        (replace(CODEC, run=b"run two."), "a"), (replace(CODEC, fingerprint=b"other"), "a"),
        (replace(CODEC, expected=replace(EXPECTED, scales=Scales(4.0, {"a": 2, "c": 2}))), "c"),
    ],
    ids=["run", "configuration", "client"],
)  # fmt: skip
def test_what_is_of_another_run_configuration_or_client_is_refused(other, client, tmp_path):
    """Seen to fail with each of the three left out of the seal."""
    data = CODEC.write_request(asked())
    with pytest.raises(FedtriError, match="of another model, head, targets, configuration, run or client"):
        other.open_request(data, client)
    data = CODEC.write_reply(reply(some("A")), asked(), ClientStore(tmp_path))
    with pytest.raises(FedtriError, match="of another model, head, targets, configuration, run or client"):
        other.read_reply(data, replace(asked(), client=client))


@pytest.mark.parametrize(("round", "kinds"), [(0, "B"), (1, "A"), (6, "A"), (0, "AB")])
def test_what_does_not_come_down_in_a_round_is_refused_by_the_client(round, kinds):
    """Seen to fail with what comes down in round 0 or 1 allowed in all."""
    data = CODEC.write_request(Request("train", round, "a", some(kinds)))
    with pytest.raises(FedtriError, match="expected that it does not travel"):
        CODEC.open_request(data, "a")


@pytest.mark.parametrize("value", [math.nan, math.inf, 101.0])
def test_a_client_refuses_what_is_not_finite_or_too_large(value, tmp_path):
    """Seen to fail with `check_norms` taken out of `read_request`."""
    down = some("A")
    down[Key("one", "A")][0, 0] = value  # pyright: ignore[reportIndexIssue]
    data = CODEC.write_request(Request("train", 0, "a", down))
    with pytest.raises(FedtriError, match=r"A of one has norm (nan|inf|101), expected a finite one up to 100"):
        CODEC.read_request(data, "a", ClientStore(tmp_path))


WRONG: dict[str, tuple[Reply, Request, str]] = {
    "an old round": (
        reply(some("A"), round=2),
        asked(0),
        "the reply is to train of round 3, expected train of round 1",
    ),
    "another phase": (reply({}), asked(0, "evaluate"), "the reply is to train of round 1, expected evaluate of"),
    "not finite": (reply({Key("one", "A"): torch.full((2, 6), math.nan)}), asked(), "A of one has norm nan"),
    "another factor": (reply(some("B")), asked(), "expected that it does not travel"),
    "another rank": (reply(some("A", "b")), asked(), r"has shape \(3, 6\), expected \(2, 6\)"),
    "nothing": (reply({}), asked(), "1 expected tensors are missing"),
    "no example": (replace(reply(some("A")), num_examples=0), asked(), "at least 1 training example"),
}


@pytest.mark.parametrize(("said", "request_", "why"), WRONG.values(), ids=WRONG.keys())
def test_a_reply_that_cannot_be_used_is_refused(said, request_, why, tmp_path):
    """Each seen to fail with its own check taken out."""
    with pytest.raises(FedtriError, match=why):
        CODEC.read_reply(CODEC.write_reply(said, replace(request_, phase="train"), ClientStore(tmp_path)), request_)


def test_a_buffer_longer_than_any_reply_is_not_looked_at(tmp_path):
    data = CODEC.write_reply(reply(some("A")), asked(), ClientStore(tmp_path))
    with pytest.raises(FedtriError, match=r"expected at most [0-9]+ bytes"):
        CODEC.read_reply(data + bytes(1 << 16), asked())
