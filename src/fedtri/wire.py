"""Factors to one packed buffer and back: a fixed header, runs of equal shapes, small JSON, a sketch, raw numbers.

No name travels: both ends derive the order of tensors from the same Layout, whose digest stands in the header. What
is read is checked against the shapes the reader expects before anything is allocated; nothing is ever unpickled.
"""

import hashlib
import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import groupby

import torch
from torch import Tensor

from fedtri.errors import FedtriError
from fedtri.types import FACTORS, Factors, Key, Layout, Phase

MAGIC, VERSION = b"FT", 1
HEADER = struct.Struct(
    "<2sBBBI8sIIIQ8s"
)  # magic, version, phase, dtype, round, layout digest, examples, meta, sketch, numbers, digest of it all
PHASES: tuple[Phase, ...] = ("sketch", "train", "evaluate")
DTYPES: dict[str, tuple[int, torch.dtype]] = {
    "float32": (0, torch.float32),
    "float16": (1, torch.float16),
    "bfloat16": (2, torch.bfloat16),
    "float64": (3, torch.float64),
}
Shapes = Mapping[Key, tuple[int, ...]]


@dataclass(frozen=True)
class Message:
    """What one buffer says; a task uses phase, round and factors alone."""

    phase: Phase
    round: int
    factors: Factors = field(default_factory=dict)
    num_examples: int = 0
    metrics: Mapping[str, float] = field(default_factory=dict)
    sketch: bytes = b""


def key_name(key: Key) -> str:
    """The one spelling of a key as a string, for files."""
    return f"{key.factor}:{key.layer}"


def parse_key(name: str) -> Key:
    """The inverse of key_name. Raises FedtriError on anything else."""
    factor, _, layer = name.partition(":")
    if not layer or not factor:
        raise FedtriError(f"tensor name {name!r}: expected FACTOR:LAYER")
    return Key(layer, factor)


def encode(message: Message, layout: Layout, dtype: str = "float32") -> bytes:
    """One buffer: 49 bytes of header, 13 to 17 a run of equal shapes, the JSON of the metrics, the numbers."""
    code, torch_dtype = DTYPES[dtype]
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
    numbers = b"".join(_raw(message.factors[order[i]], torch_dtype) for i in present)
    meta = _metrics(message.metrics)
    body = struct.pack("<I", len(runs)) + bytes(runs) + meta + message.sketch + numbers
    fields = (
        MAGIC, VERSION, PHASES.index(message.phase), code, message.round, _digest(layout),
        message.num_examples, len(meta), len(message.sketch), len(numbers),
    )  # fmt: skip
    check = hashlib.blake2b(HEADER.pack(*fields, b"\0" * 8) + body, digest_size=8).digest()
    return HEADER.pack(*fields, check) + body


def decode(data: bytes, layout: Layout, shapes: Shapes) -> Message:
    """The message in a buffer; every tensor must be one of `shapes`, of that very shape.

    Raises FedtriError in one line on a truncated or altered buffer, another version, another model's layout, a key
    or shape that is not expected, or metrics that are not named numbers. Half-precision numbers come back as float32.
    """
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
    if digest != _digest(layout):
        raise FedtriError(
            "wire: the buffer is of another model, head or targets; give both ends the same configuration"
        )
    if phase >= len(PHASES):
        raise FedtriError(f"wire: unknown phase {phase}")
    torch_dtype = next((d for c, d in DTYPES.values() if c == code), None)
    if torch_dtype is None:
        raise FedtriError(f"wire: unknown number type {code}")
    at = 4
    present = _read_runs(body[at : at + n_runs], layout, shapes)
    metrics = _read_metrics(bytes(body[at + n_runs : at + n_runs + n_meta]))
    at += n_runs + n_meta
    sketch = bytes(body[at : at + n_sketch])
    numbers = body[at + n_sketch :]
    width = torch_dtype.itemsize
    if sum(math.prod(shape) for shape in present.values()) * width != len(numbers):
        raise FedtriError(f"wire: the tensors announced do not fill the {len(numbers)} bytes of numbers")
    factors, at = {}, 0
    for key, shape in present.items():
        size = math.prod(shape) * width
        flat = torch.frombuffer(bytearray(numbers[at : at + size]), dtype=torch_dtype)
        factors[key] = (flat.float() if width < 4 else flat).reshape(shape)
        at += size
    return Message(PHASES[phase], round_, factors, examples, metrics, sketch)


def payload_bytes(factors: Factors, dtype: str = "float32") -> int:
    """The numbers alone, without any framing."""
    return sum(value.numel() for value in factors.values()) * DTYPES[dtype][1].itemsize


def _raw(tensor: Tensor, dtype: torch.dtype) -> bytes:
    return tensor.detach().to(device="cpu", dtype=dtype).contiguous().flatten().view(torch.uint8).numpy().tobytes()


def _digest(layout: Layout) -> bytes:
    return hashlib.blake2b(repr(layout).encode(), digest_size=8).digest()


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
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        raise FedtriError("wire: the metrics are not JSON") from None
    if not isinstance(found, dict) or not all(isinstance(v, int | float) for v in found.values()):
        raise FedtriError("wire: the metrics are not named numbers")
    try:
        return {str(k): float(v) for k, v in found.items()}
    except OverflowError:
        raise FedtriError("wire: the metrics hold a number too large for a float") from None
