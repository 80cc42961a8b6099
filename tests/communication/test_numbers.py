"""Number types by hand: what each tensor costs, what is read of it, and which bits are refused."""

import math
import struct

import pytest
import torch

from fedtri.communication.numbers import NUMBERS, PLAIN
from fedtri.errors import FedtriError

WORST = {"float64": 0.0, "float32": 0.0, "float16": 1e-3, "bfloat16": 1e-2, "int8": 0.5 / 127, "int4": 0.51 / 7}
"""The largest error, as a share of the largest number. sign has none: every number is read as ±m."""


def read(name: str, data: bytes, count: int) -> torch.Tensor:
    return NUMBERS[name].unpack(memoryview(data), count)


@pytest.mark.parametrize("name", [kind.name for kind in PLAIN])
def test_a_number_type_says_how_long_it_is_and_reads_what_it_wrote(name):
    """Reading and writing again changes nothing; every type has a code of its own."""
    kind = NUMBERS[name]
    for count in (15, 16, 1):
        value = torch.rand(count, generator=torch.Generator().manual_seed(0)) * 2 - 1
        assert len(kind.pack(value)) == kind.size(count)
        once = kind.rounded(value)
        assert once.dtype in (torch.float32, torch.float64)
        assert torch.equal(kind.rounded(once), once)
        if name in WORST:
            assert float((once - value).abs().max()) <= float(value.abs().max()) * WORST[name] * 1.001
    assert [one.code for one in NUMBERS.values()].count(kind.code) == 1


@pytest.mark.parametrize("name", NUMBERS)
def test_a_tensor_without_numbers_travels(name):
    kind = NUMBERS[name]
    assert kind.rounded(torch.empty(0, 3)).shape == (0, 3)
    assert len(kind.pack(torch.empty(0))) == kind.size(0)


def test_int4_by_hand():
    """7, -7, 3 and 0.4 in steps of 1: nibbles 7, 9, 3, 0, the first number in the low half of a byte.

    Seen to fail with the halves exchanged, and without the sign bit extended on the way back.
    """
    data = NUMBERS["int4"].pack(torch.tensor([7.0, -7.0, 3.0, 0.4]))
    assert data == b"\x80\x3f" + bytes([0x97, 0x03])  # 1 in bfloat16, then the halves
    assert read("int4", data, 4).tolist() == [7, -7, 3, 0]
    assert NUMBERS["int4"].size(12 * 64) == 12 * 2 + 384
    assert NUMBERS["int4"].size(65) == 2 * 2 + 33


def test_int4_cuts_a_number_off_where_all_others_gain():
    """63 numbers of 1 and one of 10. In steps of 10/7 each 1 is 0.43 too large, a squared error of 11.6. With
    0.8 · 10/7 each is 0.14 too large and the ten is read as 8: 1.3 + 4. Seen to fail with max|x| / 7 alone.
    """
    value = torch.ones(64)
    value[5] = 10.0
    found = NUMBERS["int4"].rounded(value)
    assert found[5].item() == pytest.approx(8, rel=1e-2)
    assert found[0].item() == pytest.approx(8 / 7, rel=1e-2)


def test_one_bit_by_hand():
    """m = (1 + 3 + 0 + 4) / 4 = 2, and a zero is read as +m: bits 1 0 1 0 from the lowest, 5 in one byte."""
    data = NUMBERS["sign"].pack(torch.tensor([1.0, -3.0, 0.0, -4.0]))
    assert data == struct.pack("<f", 2.0) + bytes([0b0101])
    assert read("sign", data, 4).tolist() == [2, -2, 2, -2]
    assert NUMBERS["sign"].size(12 * 64) == 4 + 96


def test_zeros_are_read_as_zeros():
    for kind in NUMBERS.values():
        assert torch.equal(kind.rounded(torch.zeros(3, 5)).float(), torch.zeros(3, 5))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", [name for name, kind in NUMBERS.items() if kind.lossy])
def test_what_is_not_finite_is_read_as_nan(name, value):
    """A diverged client says so. Seen to fail with inf / inf as the scale."""
    tensor = torch.ones(9)
    tensor[3] = value
    assert NUMBERS[name].rounded(tensor).isnan().all()


@pytest.mark.parametrize(
    ("name", "count", "last"), [("int4", 3, 0x10), ("int4", 1, 0x70), ("sign", 9, 0x02), ("sign", 1, 0x80)]
)
def test_bits_after_the_last_number_are_refused(name, count, last):
    """A buffer has one spelling. Seen to fail with the padding not looked at."""
    data = bytearray(NUMBERS[name].pack(torch.zeros(count) if name == "int4" else -torch.ones(count)))
    data[-1] |= last
    with pytest.raises(FedtriError, match=rf"^wire: the bits after the last number of type {name} are not zero"):
        read(name, bytes(data), count)


def test_every_64_numbers_of_int4_have_their_own_scale():
    """The first 64 are a thousand times as large as the others. Seen to fail with one scale a tensor: zeros."""
    value = torch.linspace(-1, 1, 80)
    value[:64] *= 1000
    found = NUMBERS["int4"].rounded(value)
    assert float((found - value)[64:].abs().max()) <= float(value[64:].abs().max()) * 0.51 / 7


@pytest.mark.parametrize("scale", [b"\x80\xbf", b"\x80\x7f"], ids=["negative", "infinite"])
def test_a_scale_that_no_sender_writes_is_refused(scale):
    with pytest.raises(FedtriError, match=r"^wire: a scale of type int4 is negative or infinite"):
        read("int4", scale + bytes(2), 4)


def test_a_number_that_int4_does_not_have_is_refused():
    data = NUMBERS["int4"].pack(torch.zeros(4))
    with pytest.raises(FedtriError, match=r"^wire: a number of type int4 is -8, expected -7 to 7"):
        read("int4", data[:-1] + b"\x80", 4)
