"""One message to one packed buffer and back: a fixed header, runs of like tensors, small JSON, a sketch, the numbers.

No tensor's name travels: both ends derive the order of tensors from the same Layout, whose digest stands in the
header. The reader checks everything against the shapes it expects before it allocates, and never unpickles.
"""

import hashlib
import json
import math
import re
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import groupby
from typing import NamedTuple

from torch import Tensor

from fedtri.adapters.layout import FACTORS, Factors, Key, Layout, key_name
from fedtri.communication.numbers import BY_CODE, NUMBERS
from fedtri.errors import FedtriError
from fedtri.metrics import PHASES, Phase

MAGIC, VERSION = b"FT", 1
HEADER = struct.Struct(
    "<2sBBI8s8sIIIQ8s"
)  # magic, version, phase, round, layout digest, base, examples, meta, sketch, numbers, digest of it all
RUN = struct.Struct("<IHBB")
"""Of tensors that follow each other in the layout and are alike: first, how many, way, dimensions; then the shape."""
LONGEST = 2**16 - 1
"""As many tensors are in one run at most."""
DELTA = 0x80
"""In a run's way: the numbers are a difference. The other bits are the number type's code."""
NOTHING = bytes(8)
"""The base of a client that is sent all it needs."""
Shapes = Mapping[Key, tuple[int, ...]]
MOST_META = 4096
"""The most bytes that a message's metrics may take, since a parser's memory is many times its input."""
METRIC = re.compile(r"[a-z][a-z0-9_]{0,31}")


class Way(NamedTuple):
    """How one tensor is written: in which number type, and whether as the difference to what its reader has."""

    numbers: str = "float32"
    delta: bool = False


@dataclass(frozen=True)
class Message:
    """What one buffer says. A request uses phase, round, factors, ways and base alone."""

    phase: Phase
    round: int
    factors: Factors = field(default_factory=dict)
    num_examples: int = 0
    metrics: Mapping[str, float] = field(default_factory=dict)
    sketch: bytes = b""
    ways: Mapping[Key, Way] = field(default_factory=dict)
    """How each tensor is written; one that is left out, in float32."""
    base: bytes = NOTHING
    """Of a request: 8 bytes that stand for what its client should hold already."""


def encode(message: Message, layout: Layout, seal: bytes = b"") -> bytes:
    """One buffer: 56 bytes of header, 12 to 16 for each run of like tensors, the metrics as JSON, the numbers.

    Args:
        message: What to say.
        layout: The client's tensors, which gives their order.
        seal: Stands for what else both ends must agree on (configuration, run, client); part of the header's digest.

    Raises:
        FedtriError: For a tensor that is not in the layout, or that does not hold floating-point numbers.
    """
    order = layout.keys(frozenset(FACTORS))
    positions = {key: i for i, key in enumerate(order)}
    if unknown := set(message.factors) - set(positions):
        raise FedtriError(f"wire: {key_name(min(unknown))} is not in the layout of this model")
    present = sorted(positions[key] for key in message.factors)
    runs, numbers = bytearray(), bytearray()
    alike = [(i, tuple(message.factors[order[i]].shape), message.ways.get(order[i], Way())) for i in present]
    for (_, shape, way), group in groupby(enumerate(alike), key=lambda item: (item[1][0] - item[0], *item[1][1:])):
        members = [i for _, (i, *_) in group]
        number = NUMBERS[way.numbers]
        code = number.code | (DELTA if way.delta else 0)
        for at in range(0, len(members), LONGEST):
            count = min(LONGEST, len(members) - at)
            runs += RUN.pack(members[at], count, code, len(shape)) + struct.pack(f"<{len(shape)}I", *shape)
        for key in (order[i] for i in members):
            numbers += number.pack(_floating(key, message.factors[key]))
    meta = _metrics(message.metrics)
    body = struct.pack("<I", len(runs)) + bytes(runs) + meta + message.sketch + bytes(numbers)
    fields = (
        MAGIC, VERSION, PHASES.index(message.phase), message.round, _digest(layout, seal), message.base,
        message.num_examples, len(meta), len(message.sketch), len(numbers),
    )  # fmt: skip
    check = hashlib.blake2b(HEADER.pack(*fields, b"\0" * 8) + body, digest_size=8).digest()
    return HEADER.pack(*fields, check) + body


def decode(data: bytes, layout: Layout, shapes: Shapes, seal: bytes = b"", limit: int | None = None) -> Message:
    """The message in a buffer. All number types but float64 come back as float32.

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
    fields = HEADER.unpack_from(data)
    magic, version, phase, round_, digest, base, examples, n_meta, n_sketch, n_numbers, check = fields
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
    at = 4
    present = _read_runs(body[at : at + n_runs], layout, shapes)
    metrics = _read_metrics(bytes(body[at + n_runs : at + n_runs + n_meta]))
    at += n_runs + n_meta
    sketch = bytes(body[at : at + n_sketch])
    numbers = body[at + n_sketch :]
    sizes = {key: NUMBERS[way.numbers].size(math.prod(shapes[key])) for key, way in present.items()}
    if sum(sizes.values()) != len(numbers):
        raise FedtriError(f"wire: the tensors announced do not fill the {len(numbers)} bytes of numbers")
    factors, at = {}, 0
    for key, way in present.items():
        part, shape = numbers[at : at + sizes[key]], shapes[key]
        factors[key] = NUMBERS[way.numbers].unpack(part, math.prod(shape)).reshape(shape)
        at += sizes[key]
    return Message(PHASES[phase], round_, factors, examples, metrics, sketch, present, base)


def most_bytes(shapes: Shapes, dtypes: Iterable[str] = ("float32",), sketch: int = 0) -> int:
    """The longest buffer that a message with these tensors can be.

    Args:
        shapes: The tensors' shapes.
        dtypes: The number types in which they may be written.
        sketch: The most bytes of a sketch.
    """
    types = [NUMBERS[name] for name in dtypes]
    numbers = sum(max(one.size(math.prod(shape)) for one in types) for shape in shapes.values())
    runs = sum(RUN.size + 4 * len(shape) for shape in shapes.values())
    return HEADER.size + 4 + runs + MOST_META + sketch + numbers


def phase_and_round(data: bytes) -> tuple[Phase, int]:
    """What a buffer's header says of phase and round, before anything else of it is read or believed.

    Raises FedtriError where it is too short, or names no phase.
    """
    if len(data) < HEADER.size:
        raise FedtriError(f"wire: expected at least {HEADER.size + 4} bytes, got {len(data)}")
    _, _, phase, round_, *_ = HEADER.unpack_from(data)
    if phase >= len(PHASES):
        raise FedtriError(f"wire: unknown phase {phase}")
    return PHASES[phase], round_


def _digest(layout: Layout, seal: bytes) -> bytes:
    return hashlib.blake2b(repr(layout).encode() + seal, digest_size=8).digest()


def _floating(key: Key, value: Tensor) -> Tensor:
    if not value.is_floating_point():
        raise FedtriError(
            f"wire: {key.factor} of {key.layer} holds {str(value.dtype).removeprefix('torch.')} numbers, expected "
            "floating-point ones; keep it at home, or train it in float32"
        )
    return value.detach().cpu()


def _read_runs(runs: memoryview, layout: Layout, shapes: Shapes) -> dict[Key, Way]:
    """The tensors that are in the buffer, in order, each with how it is written."""
    order = layout.keys(frozenset(FACTORS))
    present: dict[Key, Way] = {}
    at, previous = 0, -1
    while at < len(runs):
        if len(runs) - at < RUN.size:
            raise FedtriError("wire: a run of tensors is cut short")
        first, count, code, dims = RUN.unpack_from(runs, at)
        at += RUN.size
        if len(runs) - at < 4 * dims or first <= previous or first + count > len(order) or count == 0:
            raise FedtriError("wire: a run of tensors is out of order or points outside the layout")
        if (number := BY_CODE.get(code & ~DELTA)) is None:
            raise FedtriError(f"wire: unknown number type {code & ~DELTA}")
        shape = struct.unpack_from(f"<{dims}I", runs, at)
        at += 4 * dims
        for key in order[first : first + count]:
            if shapes.get(key) != shape:
                raise FedtriError(
                    f"wire: {key_name(key)} has shape {shape}, expected {shapes.get(key, 'that it does not travel')}"
                )
            present[key] = Way(number.name, bool(code & DELTA))
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
