"""Factors to one packed buffer and back: a fixed header, runs of equal shapes, small JSON, a sketch, raw numbers.

No name travels: both ends derive the order of tensors from the same Layout, whose digest stands in the header. What
is read is checked against the shapes the reader expects before anything is allocated; nothing is ever unpickled.

int8 numbers are round(x / s) with one scale s = max|x| / 127 a tensor, sent as float32 before them.
"""

import hashlib
import json
import math
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import groupby

import torch
from torch import Tensor

from fedtri.adapters.layout import FACTORS, Factors, Key, Layout, key_name
from fedtri.errors import FedtriError
from fedtri.messages import Phase

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
    "int8": (4, torch.int8),
}
Shapes = Mapping[Key, tuple[int, ...]]
SCALE = struct.Struct("<f")
MOST_META = 4096
"""Bytes the metrics of a message may take: a parser's memory is many times its input."""
METRIC = re.compile(r"[a-z][a-z0-9_]{0,31}")


@dataclass(frozen=True)
class Message:
    """What one buffer says; a task uses phase, round and factors alone."""

    phase: Phase
    round: int
    factors: Factors = field(default_factory=dict)
    num_examples: int = 0
    metrics: Mapping[str, float] = field(default_factory=dict)
    sketch: bytes = b""


def encode(message: Message, layout: Layout, dtype: str = "float32", seal: bytes = b"") -> bytes:
    """One buffer: 49 bytes of header, 13 to 17 a run of equal shapes, the JSON of the metrics, the numbers.

    `seal` stands for what else both ends must agree on (configuration, run, client): it goes into the header's digest.
    """
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
        MAGIC, VERSION, PHASES.index(message.phase), code, message.round, _digest(layout, seal),
        message.num_examples, len(meta), len(message.sketch), len(numbers),
    )  # fmt: skip
    check = hashlib.blake2b(HEADER.pack(*fields, b"\0" * 8) + body, digest_size=8).digest()
    return HEADER.pack(*fields, check) + body


def decode(data: bytes, layout: Layout, shapes: Shapes, seal: bytes = b"", limit: int | None = None) -> Message:
    """The message in a buffer of at most `limit` bytes; every tensor must be one of `shapes`, of that very shape.

    Raises FedtriError in one line on a truncated or altered buffer, another version, another model's layout or seal,
    a key or shape that is not expected, or metrics that are not named numbers. Half precision and int8 come back as
    float32.
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
    torch_dtype = next((d for c, d in DTYPES.values() if c == code), None)
    if torch_dtype is None:
        raise FedtriError(f"wire: unknown number type {code}")
    at = 4
    present = _read_runs(body[at : at + n_runs], layout, shapes)
    metrics = _read_metrics(bytes(body[at + n_runs : at + n_runs + n_meta]))
    at += n_runs + n_meta
    sketch = bytes(body[at : at + n_sketch])
    numbers = body[at + n_sketch :]
    if sum(_size(shape, torch_dtype) for shape in present.values()) != len(numbers):
        raise FedtriError(f"wire: the tensors announced do not fill the {len(numbers)} bytes of numbers")
    factors, at = {}, 0
    for key, shape in present.items():
        size = _size(shape, torch_dtype)
        factors[key] = _read_tensor(numbers[at : at + size], torch_dtype).reshape(shape)
        at += size
    return Message(PHASES[phase], round_, factors, examples, metrics, sketch)


def most_bytes(shapes: Shapes, dtype: str = "float32", sketch: int = 0) -> int:
    """The longest buffer that a message with these tensors, any metrics and such a sketch can be."""
    numbers = sum(_size(shape, DTYPES[dtype][1]) for shape in shapes.values())
    runs = sum(9 + 4 * len(shape) for shape in shapes.values())
    return HEADER.size + 4 + runs + MOST_META + sketch + numbers


def check_norms(factors: Factors, bound: float) -> None:
    """Raises FedtriError where a tensor has a norm that is not finite or above `bound`."""
    for key, value in factors.items():
        norm = float(torch.linalg.vector_norm(value.double()))
        if not norm <= bound:
            raise FedtriError(
                f"wire: {key.factor} of {key.layer} has norm {norm:.3g}, expected a finite one up to {bound:g}"
            )


def quantized(tensor: Tensor, dtype: str) -> Tensor:
    """The tensor as the other end will read it: what sending it in this number type makes of it."""
    data = _raw(tensor, DTYPES[dtype][1])
    return _read_tensor(memoryview(data), DTYPES[dtype][1]).reshape(tensor.shape)


def payload_bytes(factors: Factors, dtype: str = "float32") -> int:
    """The numbers alone, without any framing."""
    return sum(value.numel() for value in factors.values()) * DTYPES[dtype][1].itemsize


def _raw(tensor: Tensor, dtype: torch.dtype) -> bytes:
    tensor = tensor.detach().cpu()
    if dtype != torch.int8:
        return tensor.to(dtype).contiguous().flatten().view(torch.uint8).numpy().tobytes()
    scale = float(tensor.abs().amax()) / 127 if tensor.numel() else 0.0
    if not math.isfinite(scale):  # a diverged client says so: all of the tensor is read as NaN
        return SCALE.pack(math.nan) + bytes(tensor.numel())
    (scale,) = SCALE.unpack(SCALE.pack(scale))
    steps = torch.zeros_like(tensor) if scale == 0 else (tensor / scale).round().clamp(-127, 127)
    return SCALE.pack(scale) + steps.to(torch.int8).contiguous().numpy().tobytes()


def _read_tensor(data: memoryview, dtype: torch.dtype) -> Tensor:
    """The flat numbers of one tensor, float32 or wider."""
    if dtype != torch.int8:
        flat = torch.frombuffer(bytearray(data), dtype=dtype)
        return flat.float() if dtype.itemsize < 4 else flat
    (scale,) = SCALE.unpack_from(data)
    return torch.frombuffer(bytearray(data[SCALE.size :]), dtype=torch.int8).float() * scale


def _size(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Bytes of one tensor's numbers."""
    return math.prod(shape) * dtype.itemsize + (SCALE.size if dtype == torch.int8 else 0)


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
