"""What a client's factors start from."""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fedtri.adapters.layout import Factors, Key, Layer, Layout
from fedtri.seeds import generator

DRAWN = ("kaiming", "orthonormal")
"""The bases that both ends draw from the run's seed."""


def initial_factors(
    layout: Layout, head: Factors, *, rank: int, seed: int, basis: str = "kaiming"
) -> dict[Key, Tensor]:
    """What every client starts from, derived from the run's seed and never sent.

    "kaiming": A Kaiming-uniform as in PEFT, C = I, B = 0. "orthonormal": rows of A and columns of B orthonormal,
    C = 0. Either way ΔW = 0. The rows of a smaller rank are the first rows of a larger one. S = 1. A second adapter
    starts with a Kaiming-uniform, b = 0.
    """
    factors: dict[Key, Tensor] = {}
    for layer in layout.layers:
        if basis == "orthonormal":
            A = _orthonormal(layer.d_in, rank, generator(seed, "A", layer.name)).mT.contiguous()
            B = _orthonormal(layer.d_out, rank, generator(seed, "B", layer.name))
            C = torch.zeros(rank, rank // layout.heads)
        else:
            A, B, C = _kaiming(layer, "A", rank, seed), torch.zeros(layer.d_out, rank), torch.eye(rank)
        factors |= {Key(layer.name, "A"): A, Key(layer.name, "C"): C, Key(layer.name, "B"): B}
        if "S" in layout.extra:
            factors[Key(layer.name, "S")] = torch.ones(layout.heads)
        if "a" in layout.extra:
            factors[Key(layer.name, "a")] = _kaiming(layer, "a", rank, seed)
            factors[Key(layer.name, "b")] = torch.zeros(layer.d_out, rank)
    return factors | dict(head)


def _kaiming(layer: Layer, factor: str, rank: int, seed: int) -> Float[Tensor, "rank d_in"]:
    drawn = torch.empty(rank, layer.d_in)
    return nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=generator(seed, factor, layer.name))


def _orthonormal(d: int, rank: int, rng: torch.Generator) -> Float[Tensor, "d rank"]:
    columns = [torch.randn(d, generator=rng, dtype=torch.float64) for _ in range(rank)]
    return torch.linalg.qr(torch.stack(columns, 1)).Q.float()
