"""Mixes a tensor's numbers by a public orthogonal transform, so that rounding meets numbers of about one size.

A few numbers of a basis are many times as large as the rest, and a scale that fits these rounds the rest to nothing.
Random signs and then a Walsh–Hadamard transform spread each number over its block (DRIVE, arXiv:2105.08339). It takes
sums, differences and halving alone, in one order, so that all machines get the same bits.
"""

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from fedtri.seeds import generator

LARGEST = 4**6
"""Numbers of the largest block; a tensor is cut into blocks of powers of 4, so that the factor 1/√block is exact."""


def mixed(flat: Float[Tensor, "n"]) -> Float[Tensor, "n"]:
    """The numbers, mixed."""
    return _walsh(flat * _signs(flat))


def unmixed(flat: Float[Tensor, "n"]) -> Float[Tensor, "n"]:
    """The inverse of `mixed`."""
    return _walsh(flat) * _signs(flat)


def _signs(flat: Float[Tensor, "n"]) -> Float[Tensor, "n"]:
    """Random signs, which both ends draw from the length alone."""
    drawn = torch.randint(0, 2, flat.shape, generator=generator(0, "mixing", flat.numel()))
    return (2 * drawn - 1).to(flat)


def _walsh(flat: Float[Tensor, "n"]) -> Float[Tensor, "n"]:
    """The orthonormal Walsh–Hadamard transform of each block; its own inverse."""
    if not len(flat):
        return flat
    return torch.cat([
        _transformed(flat[start : start + count * size], size) for start, count, size in _blocks(len(flat))
    ])  # fmt: skip


def _blocks(n: int) -> Iterator[tuple[int, int, int]]:
    """(start, how many, size) of blocks of equal size that cover n numbers, the largest first."""
    start, size = 0, LARGEST
    while start < n:
        if count := (n - start) // size:
            yield start, count, size
        start += count * size
        size //= 4


def _transformed(flat: Float[Tensor, "n"], size: int) -> Float[Tensor, "n"]:
    half = 1
    while half < size:
        pairs = flat.view(-1, 2, half)
        flat = torch.stack([pairs[:, 0] + pairs[:, 1], pairs[:, 0] - pairs[:, 1]], 1).flatten()
        half *= 2
    return flat * size**-0.5
