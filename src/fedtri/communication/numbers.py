"""Number types on the wire: how the numbers of one tensor become bytes and back.

Each type is one entry of NUMBERS. float64, float32, float16 and bfloat16 are written as they are. int8 is
round(x / s), sign is sign(x), which stands for m · sign(x); the tensor's one scale s or m is sent as float32 before the
numbers. int8: s = max|x| / 127. sign: m = mean|x|, which has the least squared error (arXiv:1802.04434), eight numbers
a byte. int4: round(x / s), two numbers a byte, with a scale s in bfloat16 for each BLOCK of numbers, as a few numbers
of a basis are many times as large as the rest. s = c · max|x| / 7 with the c of CLIPPED of the least squared error.
"""

import math
import struct
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from fedtri.adapters.layout import Factors
from fedtri.communication import mixing
from fedtri.errors import FedtriError

SCALE = struct.Struct("<f")
BLOCK = 64
"""Numbers that share a scale in int4: 4.25 bits a number."""
CLIPPED = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)
"""int4 may cut the largest numbers off, so that all others are rounded less."""


@dataclass(frozen=True)
class NumberType:
    """How the numbers of one tensor are written."""

    name: str
    code: int
    """What stands for the type in a message."""
    size: Callable[[int], int]
    """Bytes of a tensor of so many numbers."""
    pack: Callable[[Tensor], bytes]
    """A tensor on the CPU to `size` bytes."""
    unpack: Callable[[memoryview, int], Float[Tensor, "n"]]
    """The inverse, from the bytes and the number of numbers: flat, in float32 or wider.

    Raises FedtriError for bits that no sender writes."""
    lossy: bool = False
    """Whether it rounds so much that differences are sent in place of values, and what is lost is made up for."""

    def rounded(self, tensor: Tensor) -> Tensor:
        """The tensor as the receiver will read it."""
        data = memoryview(self.pack(tensor.detach().cpu()))
        return self.unpack(data, tensor.numel()).reshape(tensor.shape)


def payload_bytes(factors: Factors, dtype: str = "float32") -> int:
    """The bytes of the numbers alone, without any framing."""
    return sum(NUMBERS[dtype].size(value.numel()) for value in factors.values())


def _float(name: str, code: int, dtype: torch.dtype) -> NumberType:
    """IEEE numbers (or bfloat16) as they are, little-endian; half precision is read as float32."""

    def pack(tensor: Tensor) -> bytes:
        return tensor.to(dtype).contiguous().flatten().view(torch.uint8).numpy().tobytes()

    def unpack(data: memoryview, count: int) -> Tensor:
        flat = torch.frombuffer(bytearray(data), dtype=dtype) if count else torch.empty(0, dtype=dtype)
        return flat.float() if dtype.itemsize < 4 else flat

    return NumberType(name, code, lambda count: count * dtype.itemsize, pack, unpack)


def _scaled(name: str, code: int, bits: int, scale: Callable[[Tensor], float], codes: "Codes") -> NumberType:
    """A scale and whole numbers of so many bits. A tensor that is not finite is read as NaN: a diverged client says so.

    Args:
        name: The type.
        code: What stands for it in a message.
        bits: Of one number.
        scale: The scale of a finite tensor, 0 where all is 0.
        codes: The whole numbers as bytes, and back.
    """
    size = lambda count: SCALE.size + -(-count * bits // 8)  # noqa: E731

    def pack(tensor: Tensor) -> bytes:
        flat = tensor.contiguous().flatten()
        found = scale(flat) if flat.numel() else 0.0
        (found,) = SCALE.unpack(SCALE.pack(found)) if abs(found) < torch.finfo(torch.float32).max else (math.nan,)
        if not math.isfinite(found):
            return SCALE.pack(math.nan) + bytes(size(flat.numel()) - SCALE.size)
        return SCALE.pack(found) + codes.write(flat, found)

    def unpack(data: memoryview, count: int) -> Tensor:
        (found,) = SCALE.unpack_from(data)
        whole = codes.read(np.frombuffer(data[SCALE.size :], np.uint8), count)
        return torch.from_numpy(whole.astype(np.float32)) * found

    return NumberType(name, code, size, pack, unpack, lossy=True)


@dataclass(frozen=True)
class Codes:
    """Whole numbers as packed bytes, and back."""

    write: Callable[[Float[Tensor, "n"], float], bytes]
    """(numbers, their scale) to bytes."""
    read: Callable[[np.ndarray, int], np.ndarray]
    """(bytes, how many numbers) to whole numbers."""


def _steps(flat: Float[Tensor, "n"], scale: float, most: int) -> np.ndarray:
    """round(x / scale), cut off at ±most."""
    steps = torch.zeros_like(flat) if scale == 0 else (flat / scale).round().clamp(-most, most)
    return steps.to(torch.int8).numpy()


def _int4_size(count: int) -> int:
    return 2 * -(-count // BLOCK) + -(-count // 2)


def _pack_int4(tensor: Tensor) -> bytes:
    flat = tensor.contiguous().flatten()
    if not bool((flat.abs() < torch.finfo(torch.bfloat16).max).all()):  # a diverged client says so: all is NaN
        flat = torch.full_like(flat, math.nan)
    blocks = pad(flat, (0, -flat.numel() % BLOCK)).view(-1, BLOCK)
    scales = _int4_scales(blocks)
    steps = torch.where(scales > 0, blocks / scales, 0.0).round().clamp(-7, 7).to(torch.int8).flatten()[: flat.numel()]
    codes = np.pad(steps.numpy().view(np.uint8) & 15, (0, flat.numel() % 2)).reshape(-1, 2)
    packed = (codes[:, 0] | codes[:, 1] << 4).astype(np.uint8).tobytes()
    return scales.flatten().to(torch.bfloat16).view(torch.uint8).numpy().tobytes() + packed


def _int4_scales(blocks: Float[Tensor, "m block"]) -> Float[Tensor, "m 1"]:
    """The scale with the least squared error of each block, of a few that cut the largest numbers off."""
    largest = blocks.abs().amax(1, keepdim=True) / 7
    scales = torch.stack([(cut * largest).to(torch.bfloat16).to(blocks) for cut in CLIPPED])
    rounded = (blocks / scales).round().clamp(-7, 7) * scales
    errors = (rounded - blocks).double().square().sum(-1, keepdim=True)
    return scales.gather(0, errors.nan_to_num(math.inf).argmin(0, keepdim=True))[0]


def _unpack_int4(data: memoryview, count: int) -> Float[Tensor, "count"]:
    blocks = -(-count // BLOCK)
    if not count:
        return torch.empty(0)
    scales = torch.frombuffer(bytearray(data[: 2 * blocks]), dtype=torch.bfloat16).float()
    if bool((scales < 0).any() or scales.isinf().any()):
        raise FedtriError("wire: a scale of type int4 is negative or infinite: the sender is not fedtri")
    packed = np.frombuffer(data[2 * blocks :], np.uint8)
    codes = np.stack([packed & 15, packed >> 4], 1).flatten()
    _require_empty(codes[count:], "int4")
    if (codes == 8).any():
        raise FedtriError("wire: a number of type int4 is -8, expected -7 to 7: the sender is not fedtri")
    steps = ((codes[:count] ^ 8).astype(np.int8) - 8).astype(np.float32)
    return torch.from_numpy(steps) * scales.repeat_interleave(BLOCK)[:count]


def _mixed(plain: NumberType, code: int) -> NumberType:
    """The type whose numbers are mixed before they are rounded and unmixed after; see mixing.py."""
    return NumberType(
        f"{plain.name}_mixed", code, plain.size,
        lambda tensor: plain.pack(mixing.mixed(tensor.float().flatten())),
        lambda data, count: mixing.unmixed(plain.unpack(data, count)),
        lossy=True,
    )  # fmt: skip


def _write_signs(flat: Float[Tensor, "n"], scale: float) -> bytes:
    return np.packbits((flat >= 0).numpy(), bitorder="little").tobytes()


def _read_signs(data: np.ndarray, count: int) -> np.ndarray:
    bits = np.unpackbits(data, bitorder="little")
    _require_empty(bits[count:], "sign")
    return bits[:count].astype(np.int8) * 2 - 1


def _require_empty(padding: np.ndarray, name: str) -> None:
    if padding.any():
        raise FedtriError(f"wire: the bits after the last number of type {name} are not zero: the sender is not fedtri")


_INT8 = Codes(lambda flat, scale: _steps(flat, scale, 127).tobytes(), lambda data, count: data.view(np.int8))

PLAIN = (
    _float("float32", 0, torch.float32),
    _float("float16", 1, torch.float16),
    _float("bfloat16", 2, torch.bfloat16),
    _float("float64", 3, torch.float64),
    _scaled("int8", 4, 8, lambda flat: float(flat.abs().amax()) / 127, _INT8),
    NumberType("int4", 5, _int4_size, _pack_int4, _unpack_int4, lossy=True),
    _scaled("sign", 6, 1, lambda flat: float(flat.abs().double().mean()), Codes(_write_signs, _read_signs)),
)
MIXED = {one.name: _mixed(one, 16 + one.code) for one in PLAIN if one.lossy}
"""For each type that rounds much, the one that mixes the numbers first: for what travels whole, in the type `basis`."""
NUMBERS = {one.name: one for one in (*PLAIN, *MIXED.values())}
"""Every number type by name."""
BY_CODE = {one.code: one for one in NUMBERS.values()}
