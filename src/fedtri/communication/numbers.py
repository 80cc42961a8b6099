"""Number types on the wire: how the numbers of one tensor become bytes and back, and error feedback for rounding.

Each type is one entry of NUMBERS. int8: round(x / s) with one scale s = max|x| / 127 a tensor, sent as float32 before
the numbers.
"""

import math
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from fedtri.adapters.layout import Factors, Key

SCALE = struct.Struct("<f")


@dataclass(frozen=True)
class NumberType:
    """How the numbers of one tensor are written."""

    name: str
    code: int
    """What stands for the type in a message's header."""
    size: Callable[[int], int]
    """Bytes of a tensor of so many numbers."""
    pack: Callable[[Tensor], bytes]
    """A tensor on the CPU to `size` bytes."""
    unpack: Callable[[memoryview], Float[Tensor, "n"]]
    """The inverse, flat, in float32 or wider."""
    feedback: bool = False
    """Whether what rounding loses stays with the sender and joins its next message."""

    def rounded(self, tensor: Tensor) -> Tensor:
        """The tensor as the receiver will read it."""
        return self.unpack(memoryview(self.pack(tensor.detach().cpu()))).reshape(tensor.shape)


def payload_bytes(factors: Factors, dtype: str = "float32") -> int:
    """The bytes of the numbers alone, without any framing."""
    return sum(NUMBERS[dtype].size(value.numel()) for value in factors.values())


def with_feedback(
    factors: Factors, lost: Mapping[Key, Tensor], numbers: NumberType
) -> tuple[dict[Key, Tensor], dict[Key, Tensor]]:
    """Error feedback (arXiv:1901.09847): x + e is sent as Q(x + e), and e' = x + e - Q(x + e) is kept for next time.

    Args:
        factors: The tensors x of this message.
        lost: e of every tensor that was ever sent; a tensor without one has lost nothing.
        numbers: The number type; Q is what reading back makes of a tensor.

    Returns:
        (x + e, which is to be packed; e of every tensor from now on). A tensor that this message leaves out keeps its
        e. Where a number is not finite nothing is added and nothing kept: the server refuses such a reply.
    """
    if not numbers.feedback or not all(bool(value.isfinite().all()) for value in factors.values()):
        return dict(factors), dict(lost)
    sent = {key: value + lost[key] if key in lost else value for key, value in factors.items()}
    now = {key: value - numbers.rounded(value) for key, value in sent.items()}
    return sent, {**lost, **now}


def _float(name: str, code: int, dtype: torch.dtype) -> NumberType:
    """IEEE numbers (or bfloat16) as they are, little-endian; half precision is read as float32."""

    def pack(tensor: Tensor) -> bytes:
        return tensor.to(dtype).contiguous().flatten().view(torch.uint8).numpy().tobytes()

    def unpack(data: memoryview) -> Tensor:
        flat = torch.frombuffer(bytearray(data), dtype=dtype)
        return flat.float() if dtype.itemsize < 4 else flat

    return NumberType(name, code, lambda count: count * dtype.itemsize, pack, unpack)


def _pack_int8(tensor: Tensor) -> bytes:
    scale = float(tensor.abs().amax()) / 127 if tensor.numel() else 0.0
    if not math.isfinite(scale):  # a diverged client says so: all of the tensor is read as NaN
        return SCALE.pack(math.nan) + bytes(tensor.numel())
    (scale,) = SCALE.unpack(SCALE.pack(scale))
    steps = torch.zeros_like(tensor) if scale == 0 else (tensor / scale).round().clamp(-127, 127)
    return SCALE.pack(scale) + steps.to(torch.int8).contiguous().numpy().tobytes()


def _unpack_int8(data: memoryview) -> Tensor:
    (scale,) = SCALE.unpack_from(data)
    return torch.frombuffer(bytearray(data[SCALE.size :]), dtype=torch.int8).float() * scale


NUMBERS = {
    one.name: one
    for one in (
        _float("float32", 0, torch.float32),
        _float("float16", 1, torch.float16),
        _float("bfloat16", 2, torch.bfloat16),
        _float("float64", 3, torch.float64),
        NumberType("int8", 4, lambda count: SCALE.size + count, _pack_int8, _unpack_int8, feedback=True),
    )
}
"""Every number type by name."""
BY_CODE = {one.code: one for one in NUMBERS.values()}
