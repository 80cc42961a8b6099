"""One message to one packed buffer and back: a fixed header, runs of equal shapes, small JSON, a sketch, the numbers.

No tensor's name travels: both ends derive the order of tensors from the same Layout, whose digest stands in the
header. The reader checks everything against the shapes it expects before it allocates, and never unpickles.
"""

import hashlib
import json
import math
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import groupby

from fedtri.adapters.layout import FACTORS, Factors, Key, Layout, key_name
from fedtri.communication.numbers import BY_CODE, NUMBERS
from fedtri.errors import FedtriError
from fedtri.metrics import PHASES, Phase

MAGIC, VERSION = b"FT", 1
HEADER = struct.Struct(
    "<2sBBBI8sIIIQ8s"
)  # magic, version, phase, dtype, round, layout digest, examples, meta, sketch, numbers, digest of it all
Shapes = Mapping[Key, tuple[int, ...]]
MOST_META = 4096
"""The most bytes that a message's metrics may take, since a parser's memory is many times its input."""
METRIC = re.compile(r"[a-z][a-z0-9_]{0,31}")


@dataclass(frozen=True)
class Message:
    """What one buffer says. A request uses phase, round and factors alone."""

    phase: Phase
    round: int
    factors: Factors = field(default_factory=dict)
    num_examples: int = 0
    metrics: Mapping[str, float] = field(default_factory=dict)
    sketch: bytes = b""


def encode(message: Message, layout: Layout, dtype: str = "float32", seal: bytes = b"") -> bytes:
    """One buffer: 49 bytes of header, 13 to 17 for each run of equal shapes, the metrics as JSON, the numbers.

    Args:
        message: What to say.
        layout: The client's tensors, which gives their order.
        dtype: The number type, one of NUMBERS.
        seal: Stands for what else both ends must agree on (configuration, run, client); part of the header's digest.

    Raises:
        FedtriError: For a tensor that is not in the layout.
    """
    number = NUMBERS[dtype]
    order = layout.keys(frozenset(FACTORS))
    positions = {key: i for i, key in enumerate(order)}
    if unknown := set(message.factors) - set(positions):
        raise FedtriError(f"wire: {key_name(min(unknown))} is not in the layout of this model")
    present = sorted(positions[key] for key in message.factors)
    runs = bytearray()
    shapes = [(i, tuple(message.factors[order[i]].shape)) for i in present]
    for (_, shape), group in groupby(enumerate(shapes), key=lambda item: (item[1][0] - item[0], item[1][1])):
        members = [i for _, (i, _) in group]
        runs += struct.pack(f"<IIB{len(shape)}I", members[0], len(members), len(shape), *shape)
    numbers = b"".join(number.pack(message.factors[order[i]].detach().cpu()) for i in present)
    meta = _metrics(message.metrics)
    body = struct.pack("<I", len(runs)) + bytes(runs) + meta + message.sketch + numbers
    fields = (
        MAGIC, VERSION, PHASES.index(message.phase), number.code, message.round, _digest(layout, seal),
        message.num_examples, len(meta), len(message.sketch), len(numbers),
    )  # fmt: skip
    check = hashlib.blake2b(HEADER.pack(*fields, b"\0" * 8) + body, digest_size=8).digest()
    return HEADER.pack(*fields, check) + body


def decode(data: bytes, layout: Layout, shapes: Shapes, seal: bytes = b"", limit: int | None = None) -> Message:
    """The message in a buffer. Half precision and int8 come back as float32.

    Args:
        data: The buffer, as it came.
        layout: The client's tensors, which gives their order.
        shapes: The tensors that may be in it; each must have that very shape. It need not hold all of them.
        seal: As the sender should have given it.
        limit: The most bytes that the buffer may have; None: any.

    Raises:
        FedtriError: In one line, on a buffer that is too long, cut or altered, of another version, layout or seal; on
            a tensor or shape that is not expected; on metrics that are not named numbers.
    """
    if limit is not None and len(data) > limit:
        raise FedtriError(f"wire: expected at most {limit} bytes, got {len(data)}")
    if len(data) < HEADER.size + 4:
        raise FedtriError(f"wire: expected at least {HEADER.size + 4} bytes, got {len(data)}")
    magic, version, phase, code, round_, digest, examples, n_meta, n_sketch, n_numbers, check = HEADER.unpack_from(data)
    if magic != MAGIC or version != VERSION:
        raise FedtriError(f"wire: expected a fedtri buffer of version {VERSION}, got {magic!r} version {version}")
    (n_runs,) = struct.unpack_from("<I", data, HEADER.size)
    total = HEADER.size + 4 + n_runs + n_meta + n_sketch + n_numbers
    if total != len(data):
        raise FedtriError(
            f"wire: the header announces {total} bytes, the buffer has {len(data)}: it was cut or altered"
        )
    blank = data[: HEADER.size - 8] + b"\0" * 8
    body = memoryview(data)[HEADER.size :]
    if hashlib.blake2b(blank + body, digest_size=8).digest() != check:
        raise FedtriError("wire: the checksum does not match: the buffer was altered on its way")
    if digest != _digest(layout, seal):
        among = "model, head, targets, configuration, run or client" if seal else "model, head or targets"
        raise FedtriError(f"wire: the buffer is of another {among}; give both ends the same configuration")
    if phase >= len(PHASES):
        raise FedtriError(f"wire: unknown phase {phase}")
    if (number := BY_CODE.get(code)) is None:
        raise FedtriError(f"wire: unknown number type {code}")
    at = 4
    present = _read_runs(body[at : at + n_runs], layout, shapes)
    metrics = _read_metrics(bytes(body[at + n_runs : at + n_runs + n_meta]))
    at += n_runs + n_meta
    sketch = bytes(body[at : at + n_sketch])
    numbers = body[at + n_sketch :]
    if sum(number.size(math.prod(shape)) for shape in present.values()) != len(numbers):
        raise FedtriError(f"wire: the tensors announced do not fill the {len(numbers)} bytes of numbers")
    factors, at = {}, 0
    for key, shape in present.items():
        size = number.size(math.prod(shape))
        factors[key] = number.unpack(numbers[at : at + size]).reshape(shape)
        at += size
    return Message(PHASES[phase], round_, factors, examples, metrics, sketch)


def most_bytes(shapes: Shapes, dtype: str = "float32", sketch: int = 0) -> int:
    """The longest buffer that a message with these tensors, any metrics and a sketch of so many bytes can be."""
    numbers = sum(NUMBERS[dtype].size(math.prod(shape)) for shape in shapes.values())
    runs = sum(9 + 4 * len(shape) for shape in shapes.values())
    return HEADER.size + 4 + runs + MOST_META + sketch + numbers


def phase_and_round(data: bytes) -> tuple[Phase, int]:
    """What a buffer's header says of phase and round, before anything else of it is read or believed.

    Raises FedtriError where it is too short, or names no phase.
    """
    if len(data) < HEADER.size:
        raise FedtriError(f"wire: expected at least {HEADER.size + 4} bytes, got {len(data)}")
    _, _, phase, _, round_, *_ = HEADER.unpack_from(data)
    if phase >= len(PHASES):
        raise FedtriError(f"wire: unknown phase {phase}")
    return PHASES[phase], round_


def _digest(layout: Layout, seal: bytes) -> bytes:
    return hashlib.blake2b(repr(layout).encode() + seal, digest_size=8).digest()


def _read_runs(runs: memoryview, layout: Layout, shapes: Shapes) -> dict[Key, tuple[int, ...]]:
    order = layout.keys(frozenset(FACTORS))
    present: dict[Key, tuple[int, ...]] = {}
    at, previous = 0, -1
    while at < len(runs):
        if len(runs) - at < 9:
            raise FedtriError("wire: a run of tensors is cut short")
        first, count, dims = struct.unpack_from("<IIB", runs, at)
        at += 9
        if len(runs) - at < 4 * dims or first <= previous or first + count > len(order) or count == 0:
            raise FedtriError("wire: a run of tensors is out of order or points outside the layout")
        shape = struct.unpack_from(f"<{dims}I", runs, at)
        at += 4 * dims
        for key in order[first : first + count]:
            if shapes.get(key) != shape:
                raise FedtriError(
                    f"wire: {key_name(key)} has shape {shape}, expected {shapes.get(key, 'that it does not travel')}"
                )
            present[key] = shape
        previous = first + count - 1
    return present


def _metrics(metrics: Mapping[str, float]) -> bytes:
    if not metrics:
        return b""
    return json.dumps({k: float(f"{v:.6g}") for k, v in metrics.items()}, separators=(",", ":")).encode()


def _read_metrics(text: bytes) -> dict[str, float]:
    if not text:
        return {}
    if len(text) > MOST_META:
        raise FedtriError(f"wire: the metrics take {len(text)} bytes, expected at most {MOST_META}")
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        raise FedtriError("wire: the metrics are not JSON") from None
    if not isinstance(found, dict) or not all(isinstance(v, int | float) for v in found.values()):
        raise FedtriError("wire: the metrics are not named numbers")
    if any(not METRIC.fullmatch(name) for name in found):
        raise FedtriError("wire: a metric's name is not a short word of lower-case letters, digits and underscores")
    try:
        return {str(k): float(v) for k, v in found.items()}
    except OverflowError:
        raise FedtriError("wire: the metrics hold a number too large for a float") from None
