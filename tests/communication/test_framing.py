"""Laws of the wire: what was encoded is what is decoded, in few bytes; anything else is refused in one line."""

import hashlib
import math
import struct
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedtri.adapters.layout import Key, Layer, Layout, key_name, parse_key
from fedtri.communication import framing, numbers
from fedtri.communication.codec import check_norms
from fedtri.errors import FedtriError
from tiny import assert_same

LAYOUT = Layout(
    tuple(Layer(f"layers.{i}.{name}", 6, d_out) for i in range(2) for name, d_out in (("query", 6), ("up", 10))),
    (("score.weight", (3, 6)), ("score.bias", (3,))),
)
SHAPES = LAYOUT.shapes(2)


def factors(kinds: str, dtype: torch.dtype = torch.float32) -> dict[Key, torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    return {key: torch.randn(SHAPES[key], generator=rng).to(dtype) for key in LAYOUT.keys(frozenset(kinds))}


def message(kinds: str = "ABH", **parts) -> framing.Message:
    said = {"num_examples": 7, "metrics": {"loss": 0.5}, "sketch": b"sketch"} | parts
    return framing.Message("train", 3, factors(kinds), **said)


BUFFER = framing.encode(message(), LAYOUT)


def sealed(data: bytes) -> bytes:
    """The buffer with a checksum that fits it again, as a liar would send it."""
    at = framing.HEADER.size
    check = hashlib.blake2b(data[: at - 8] + b"\0" * 8 + data[at:], digest_size=8).digest()
    return data[: at - 8] + check + data[at:]


def test_no_tensor_at_all_is_a_header():
    data = framing.encode(framing.Message("evaluate", 9), LAYOUT)
    assert framing.decode(data, LAYOUT, SHAPES) == framing.Message("evaluate", 9)
    assert len(data) == framing.HEADER.size + 4


@pytest.mark.parametrize("kinds", ["C", "A", "AB", "ABH", "H", "ABCH"])
@pytest.mark.parametrize("dtype", [one.name for one in numbers.NUMBERS.values() if not one.lossy])
def test_what_is_decoded_is_what_was_encoded(kinds, dtype):
    """In the wire's precision; half precision comes back as float32."""
    precision = getattr(torch, dtype)
    sent = message(kinds, ways=dict.fromkeys(factors(kinds), framing.Way(dtype)))
    got = framing.decode(framing.encode(sent, LAYOUT), LAYOUT, SHAPES)
    assert_same(got.factors, {key: value.to(precision).to(torch.promote_types(precision, torch.float32))
                              for key, value in sent.factors.items()})  # fmt: skip
    assert (got.phase, got.round, got.num_examples, got.metrics, got.sketch) == (
        "train",
        3,
        7,
        {"loss": 0.5},
        b"sketch",
    )


def test_the_layouts_order_travels_not_the_senders():
    reordered = framing.Message("train", 0, dict(reversed(factors("ABC").items())))
    assert framing.encode(reordered, LAYOUT) == framing.encode(framing.Message("train", 0, factors("ABC")), LAYOUT)


def test_any_part_of_the_tensors_may_travel():
    """What a client has already is left out: every subset of four layers' cores comes back as it was."""
    cores = factors("C")
    for chosen in range(16):
        part = {key: value for i, (key, value) in enumerate(cores.items()) if chosen >> i & 1}
        data = framing.encode(framing.Message("train", 0, part), LAYOUT)
        assert_same(framing.decode(data, LAYOUT, SHAPES).factors, part)


def test_a_strided_tensor_travels_as_its_numbers():
    key = Key("layers.0.up", "A")
    value = torch.arange(12.0).reshape(6, 2).mT
    data = framing.encode(framing.Message("train", 0, {key: value}), LAYOUT)
    assert_same(framing.decode(data, LAYOUT, SHAPES).factors, {key: torch.arange(12.0).reshape(6, 2).mT.contiguous()})


def test_no_name_travels():
    assert b"query" not in BUFFER
    assert b"score" not in BUFFER


def test_cores_cost_their_numbers_and_little_else():
    """MiniLM, r = 8: r² · 4 bytes a layer; seen to fail with a run a tensor, and with metrics in full precision twice.

    FedIT's A and B are 96 times as many numbers: (384 · 8 + 8 · 384) / 8².
    """
    layout = Layout(tuple(Layer(f"encoder.layer.{i}.attention.self.value", 384, 384) for i in range(12)), ())
    shapes = layout.shapes(8)
    cores = {key: torch.randn(shapes[key]) for key in layout.keys(frozenset("C"))}
    names = ("train_loss", "loss", "accuracy", "validation_loss")
    said = framing.Message("train", 2**31, cores, 10**9, dict.fromkeys(names, 1 / 3))
    assert numbers.payload_bytes(cores) == 12 * 8 * 8 * 4 == 3072
    assert len(framing.encode(said, layout)) <= 1.02 * 3072 + 256
    pairs = {key: torch.zeros(shapes[key]) for key in layout.keys(frozenset("AB"))}
    assert numbers.payload_bytes(pairs) == 96 * 3072
    assert numbers.payload_bytes(cores, "float16") == 3072 / 2


def test_metrics_keep_six_digits():
    said = framing.Message("train", 0, metrics={"loss": 0.123456789, "large": 1.5e30, "zero": 0.0})
    data = framing.encode(said, LAYOUT)
    assert framing.decode(data, LAYOUT, SHAPES).metrics == {"loss": 0.123457, "large": 1.5e30, "zero": 0.0}


@given(st.integers(0, len(BUFFER) - 1), st.integers(1, 255))
def test_an_altered_byte_is_noticed(at, flip):
    """Seen to fail with a checksum over the body alone (another round, another number of examples)."""
    altered = bytearray(BUFFER)
    altered[at] ^= flip
    with pytest.raises(FedtriError, match=r"^wire: "):
        framing.decode(bytes(altered), LAYOUT, SHAPES)


@given(st.integers(0, len(BUFFER) - 1))
def test_a_cut_buffer_is_noticed(length):
    with pytest.raises(FedtriError, match=r"^wire: "):
        framing.decode(BUFFER[:length], LAYOUT, SHAPES)


@given(st.integers(0, len(BUFFER)), st.binary(min_size=1, max_size=9))
def test_an_inserted_piece_is_noticed(at, piece):
    with pytest.raises(FedtriError, match=r"^wire: "):
        framing.decode(BUFFER[:at] + piece + BUFFER[at:], LAYOUT, SHAPES)


@given(st.binary(max_size=200))
def test_noise_is_refused(noise):
    for data in (noise, BUFFER[:3] + noise, sealed(BUFFER[: framing.HEADER.size] + noise)):
        with pytest.raises(FedtriError, match=r"^wire: "):
            framing.decode(data, LAYOUT, SHAPES)


@given(st.lists(st.tuples(st.integers(0, len(BUFFER) - 1), st.integers(0, 255)), min_size=1, max_size=4))
def test_a_liar_who_fixes_the_checksum_gets_expected_shapes_or_nothing(forged):
    """No other exception, and never a tensor that was not expected; seen to fail with shapes taken on trust."""
    altered = bytearray(BUFFER)
    for at, value in forged:
        altered[at] = value
    try:
        got = framing.decode(sealed(bytes(altered)), LAYOUT, SHAPES)
    except FedtriError:
        return
    assert {key: tuple(value.shape) for key, value in got.factors.items()}.items() <= SHAPES.items()
    assert all(isinstance(value, float) for value in got.metrics.values())


def forged(**changes: int) -> bytes:
    """The buffer with some header fields replaced."""
    names = ["magic", "version", "phase", "round", "digest", "base", "examples", "meta", "sketch", "numbers", "check"]
    fields = dict(zip(names, framing.HEADER.unpack_from(BUFFER), strict=True)) | changes
    return sealed(framing.HEADER.pack(*fields.values()) + BUFFER[framing.HEADER.size :])


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"version": 2}, "version 1"),
        ({"phase": 9}, "phase 9"),
        ({"numbers": 2**63}, "announces"),
        ({"meta": 2**32 - 1}, "announces"),
        ({"digest": b"another!"}, "another model"),
    ],
)
def test_forged_headers_are_refused_before_anything_is_allocated(changes, why):
    with pytest.raises(FedtriError, match=why):
        framing.decode(forged(**changes), LAYOUT, SHAPES)


@pytest.mark.parametrize(
    ("runs", "why"),
    [
        (struct.pack("<IHBBII", 0, 1, 0, 2, 2**31, 2**31), "has shape"),
        (struct.pack("<IHBBII", 0, 2**16 - 1, 0, 2, 2, 6), "outside the layout"),
        (struct.pack("<IHBBII", 0, 0, 0, 2, 2, 6), "outside the layout"),
        (struct.pack("<IHBBII", 1, 1, 0, 2, 2, 6) * 2, "out of order"),
        (struct.pack("<IHBB", 0, 1, 0, 255), "out of order"),
        (struct.pack("<IH", 0, 1), "cut short"),
        (struct.pack("<IHBBII", 0, 1, 9, 2, 2, 6), "number type 9"),
        (struct.pack("<IHBBII", 0, 1, 0x80 | 9, 2, 2, 6), "number type 9"),
        (struct.pack("<IHBBII", 0, 1, 3, 2, 2, 6), "do not fill"),
    ],
)
def test_forged_runs_are_refused(runs, why):
    header = list(framing.HEADER.unpack_from(framing.encode(framing.Message("train", 0), LAYOUT)))
    data = sealed(framing.HEADER.pack(*header) + struct.pack("<I", len(runs)) + runs)
    with pytest.raises(FedtriError, match=why):
        framing.decode(data, LAYOUT, SHAPES)


@pytest.mark.parametrize(
    "text",
    [
        b"{",
        b"[1]",
        b'"x"',
        b'{"loss": "low"}',
        b'{"loss": [1]}',
        b'{"loss": 1' + b"0" * 400 + b"}",
        b"\xff",
        b"[" * 9999,
    ],
    ids=["cut", "a list", "a string", "a word", "nested", "a huge number", "not text", "deep"],
)
def test_metrics_that_are_not_named_numbers_are_refused(text):
    """Seen to fail with an OverflowError for an integer of 400 digits."""
    fields = list(framing.HEADER.unpack_from(framing.encode(framing.Message("train", 0), LAYOUT)))
    fields[7] = len(text)
    with pytest.raises(FedtriError, match="metrics"):
        framing.decode(sealed(framing.HEADER.pack(*fields) + bytes(4) + text), LAYOUT, SHAPES)


def test_a_metric_that_is_not_finite_travels_as_what_it_is():
    """A diverged client says so; its tensors are what the server refuses."""
    data = framing.encode(framing.Message("train", 0, metrics={"loss": math.nan, "worse": math.inf}), LAYOUT)
    got = framing.decode(data, LAYOUT, SHAPES).metrics
    assert math.isnan(got["loss"])
    assert got["worse"] == math.inf


def test_another_layout_or_rank_is_refused():
    for other in (Layout(LAYOUT.layers, ()), Layout(LAYOUT.layers[::-1], LAYOUT.head)):
        with pytest.raises(FedtriError, match="another model"):
            framing.decode(BUFFER, other, other.shapes(2))
    with pytest.raises(FedtriError, match="has shape"):
        framing.decode(BUFFER, LAYOUT, LAYOUT.shapes(3))
    with pytest.raises(FedtriError, match="does not travel"):
        framing.decode(BUFFER, LAYOUT, {key: shape for key, shape in SHAPES.items() if key.factor != "H"})


def test_a_tensor_of_no_layout_is_not_encoded():
    with pytest.raises(FedtriError, match="A:nowhere"):
        framing.encode(framing.Message("train", 0, {Key("nowhere", "A"): torch.zeros(2, 6)}), LAYOUT)


def test_a_key_is_spelt_one_way():
    key = Key("bert.encoder.layer.0:odd", "A")
    assert parse_key(key_name(key)) == key
    for wrong in ("", "A", "A:", ":layer"):
        with pytest.raises(FedtriError, match="FACTOR:LAYER"):
            parse_key(wrong)


def test_int8_is_right_to_half_a_step_of_each_tensor():
    """s = max|x| / 127 a tensor, 4 + n bytes; seen to fail with one scale for all tensors."""
    sent = message("ABH", sketch=b"")
    small = Key("layers.0.up", "A")
    sent.factors[small].mul_(1e-3)  # pyright: ignore
    data = framing.encode(replace(sent, ways=dict.fromkeys(sent.factors, framing.Way("int8"))), LAYOUT)
    got = framing.decode(data, LAYOUT, SHAPES).factors
    for key, value in sent.factors.items():
        assert float((got[key] - value).abs().max()) <= float(value.abs().max()) / 127 / 2 * 1.001
    less = 3 * sum(value.numel() for value in sent.factors.values()) - 4 * len(sent.factors)
    assert len(framing.encode(sent, LAYOUT)) - len(data) == less


def test_int8_of_what_is_not_finite_is_read_as_nan():
    key = Key("layers.0.up", "A")
    sent = framing.Message("train", 0, {key: torch.full((2, 6), math.inf)}, ways={key: framing.Way("int8")})
    data = framing.encode(sent, LAYOUT)
    got = framing.decode(data, LAYOUT, SHAPES).factors
    assert got[key].isnan().all()
    with pytest.raises(FedtriError, match="norm nan"):
        check_norms(got, 1e4)


def test_another_seal_is_refused():
    """Another run, client or configuration; seen to fail with the seal left out of the digest."""
    data = framing.encode(message(), LAYOUT, seal=b"run one")
    assert framing.decode(data, LAYOUT, SHAPES, b"run one").round == 3
    for other in (b"", b"run two"):
        with pytest.raises(FedtriError, match="another model"):
            framing.decode(data, LAYOUT, SHAPES, other)


def test_a_buffer_above_the_limit_is_not_looked_at():
    limit = framing.most_bytes(SHAPES)
    assert len(BUFFER) <= limit
    with pytest.raises(FedtriError, match=f"at most {limit} bytes"):
        framing.decode(BUFFER + bytes(limit), LAYOUT, SHAPES, limit=limit)
