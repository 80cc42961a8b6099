"""Laws of the wire's reader on buffers that a hostile or broken sender makes; hypothesis draws the mutations."""

import hashlib
import struct
import tracemalloc
from dataclasses import replace

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedtri.adapters.layout import FACTORS, Key, Layer, Layout
from fedtri.communication import framing
from fedtri.errors import FedtriError
from tiny import assert_same

LAYOUT = Layout((Layer("one", 6, 5), Layer("two", 4, 6)), (("head.weight", (3, 5)),))
SHAPES = LAYOUT.shapes(2)
SEAL = b"run and client"
LIMIT = framing.most_bytes(SHAPES, ["float32", "int4"], sketch=64)
OVERHEAD = 1 << 17
"""Bytes of Python objects around what is read: keys, shapes, a message, an error."""
FOREVER = settings(max_examples=2600, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


def message(kinds: str, seed: int = 0, numbers: str = "float32") -> framing.Message:
    drawn = torch.Generator().manual_seed(seed)
    up = {key: torch.randn(SHAPES[key], generator=drawn) for key in LAYOUT.keys(frozenset(kinds))}
    ways = {**dict.fromkeys(up, framing.Way(numbers)), Key("two", "A"): framing.Way("sign", delta=True)}
    return framing.Message("train", 3, up, 17, {"train_loss": 0.5, "accuracy": 0.25}, b"sketch" * 5, ways)


SOURCES = [framing.encode(message(kinds, i, name), LAYOUT, SEAL) for i, (kinds, name) in enumerate(
    [("C", "float32"), ("ABH", "float32"), ("ABC", "int8"), ("AB", "float16"), ("", "float32"), ("BH", "int4"),
     ("ACB", "sign")]
)]  # fmt: skip
KEYS = LAYOUT.keys(frozenset(FACTORS))

numbers = st.one_of(st.integers(0, 2**64 - 1), st.sampled_from([0, 1, 2**31, 2**32 - 1, 2**42, 2**63, 2**64 - 1]))
places = st.floats(0, 1, exclude_max=True)
changes = st.one_of(
    st.tuples(st.just("flip"), places, st.integers(0, 7)),
    st.tuples(st.just("u4"), places, numbers),
    st.tuples(st.just("u8"), places, numbers),
    st.tuples(st.just("insert"), places, st.binary(min_size=1, max_size=40)),
    st.tuples(st.just("delete"), places, st.integers(1, 60)),
    st.tuples(st.just("splice"), places, st.sampled_from(SOURCES)),
    st.tuples(st.just("header"), st.integers(0, framing.HEADER.size + 20), st.binary(min_size=1, max_size=8)),
)


def mutated(data: bytes, change: tuple) -> bytes:
    kind, where, what = change
    at = where if kind == "header" else int(where * len(data))
    match kind:
        case "flip":
            return data[:at] + bytes([data[at] ^ 1 << what]) + data[at + 1 :] if data else data
        case "u4":
            return data[:at] + struct.pack("<I", what % 2**32) + data[at + 4 :]
        case "u8":
            return data[:at] + struct.pack("<Q", what) + data[at + 8 :]
        case "insert":
            return data[:at] + what + data[at:]
        case "delete":
            return data[:at] + data[at + what :]
        case "splice":
            return data[:at] + what[at:]
        case _:
            return data[:at] + what + data[at + len(what) :]


def signed(data: bytes) -> bytes:
    """The buffer with the checksum that belongs to it: what a sender who wants to mislead would send."""
    head = data[: framing.HEADER.size - 8]
    body = data[framing.HEADER.size :]
    return head + hashlib.blake2b(head + b"\0" * 8 + body, digest_size=8).digest() + body


def read(data: bytes) -> tuple[framing.Message | None, int]:
    """The message, or None where it is refused, and the most bytes that were held beyond the buffer itself."""
    tracemalloc.start()
    try:
        return framing.decode(data, LAYOUT, SHAPES, SEAL, LIMIT), tracemalloc.get_traced_memory()[1]
    except FedtriError:
        return None, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@FOREVER
@given(st.sampled_from(SOURCES), st.lists(changes, min_size=1, max_size=4))
def test_a_buffer_changed_on_its_way_is_refused_and_never_outgrows_the_limit(source, several):
    """2,600 mutated buffers. Seen to fail with the checksum not compared."""
    data = source
    for change in several:
        data = mutated(data, change)
    found, held = read(data)
    assert held <= LIMIT + OVERHEAD
    assert found is None or data in SOURCES


@FOREVER
@given(st.sampled_from(SOURCES), st.lists(changes, min_size=1, max_size=4))
def test_a_buffer_signed_anew_is_refused_or_says_what_a_valid_one_may_say(source, several):
    """2,600 mutated buffers whose checksum is right: what is accepted has the layout's keys and shapes, holds no
    more numbers than were sent, and reads the same when it is sent again.
    """
    data = source
    for change in several:
        data = mutated(data, change)
    data = signed(data)
    found, held = read(data)
    assert held <= LIMIT + OVERHEAD
    if found is None:
        return
    assert all(tuple(value.shape) == SHAPES[key] for key, value in found.factors.items())
    assert list(found.factors) == [key for key in KEYS if key in found.factors]
    again = framing.decode(framing.encode(replace(found, ways={}), LAYOUT, seal=SEAL), LAYOUT, SHAPES, SEAL)
    assert_same(again.factors, found.factors)
    assert (again.phase, again.round, again.num_examples, again.sketch) == (
        found.phase, found.round, found.num_examples, found.sketch,
    )  # fmt: skip
    assert set(found.ways) == set(found.factors)


def test_the_limit_is_what_a_full_message_needs():
    """Every tensor, metrics of every client and a sketch fit; the numbers are most of it where there are many."""
    full = framing.encode(message("ABCH"), LAYOUT, seal=SEAL)
    assert len(full) <= LIMIT
    wide = Layout(tuple(Layer(f"l{i}", 384, 384) for i in range(12)), ())
    c = {key: shape for key, shape in wide.shapes(8).items() if key.factor == "C"}
    assert framing.most_bytes(c) < 3072 + 12 * 17 + 4096 + 64
    assert Key("l0", "C") in c
