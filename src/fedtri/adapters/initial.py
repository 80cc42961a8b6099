"""What a client's factors start from, and where A (and B, where it is a basis too) come from.

"kaiming": drawn as in PEFT. "orthonormal": drawn, orthonormal rows of A and columns of B. "weights": the leading
singular vectors of the frozen W0, right ones for A and left ones for B. "gradient": those of the clients' pooled first
gradient; the server sends them before a client first trains, and until then a client holds drawn ones.
"""

import math
from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fedtri.adapters.layout import Factors, Key, Layer, Layout
from fedtri.adapters.subspace import leading
from fedtri.seeds import generator

Basis = Literal["kaiming", "orthonormal", "weights", "gradient"]
BASES: tuple[Basis, ...] = ("kaiming", "orthonormal", "weights", "gradient")
Weight = Callable[[str], Float[Tensor, "d_out d_in"]]
"""The frozen W0 of the layer of this name."""


def initial_factors(
    layout: Layout,
    head: Factors,
    *,
    rank: int,
    seed: int,
    basis: Basis = "kaiming",
    core: bool = False,
    weight: Weight | None = None,
) -> dict[Key, Tensor]:
    """What every client starts from. Each end derives it from the run's seed and the model; it is never sent.

    ΔW = 0 either way: C = 0 between A and B, or C = I and B = 0. The rows of a smaller rank are the first rows of a
    larger one. S = 1. A second adapter starts with a Kaiming-uniform, b = 0.

    Args:
        layout: The client's tensors.
        head: What the model itself says: the head, DoRA's magnitudes, a backbone that learns.
        rank: The client's rank.
        seed: The run's seed.
        basis: Where A comes from.
        core: Whether B comes from there too, and C starts at 0.
        weight: Gives W0, for "weights".
    """
    factors: dict[Key, Tensor] = {}
    if basis == "gradient":
        basis = "orthonormal" if core else "kaiming"
    for layer in layout.layers:
        A, B = _basis(layer, rank, seed, basis, weight)
        C = torch.zeros(rank, rank // layout.heads) if core else torch.eye(rank)
        B = B if core else torch.zeros(layer.d_out, rank)
        factors |= {Key(layer.name, "A"): A, Key(layer.name, "C"): C, Key(layer.name, "B"): B}
        if "S" in layout.extra:
            factors[Key(layer.name, "S")] = torch.ones(layout.heads)
        if "a" in layout.extra:
            factors[Key(layer.name, "a")] = _kaiming(layer.d_in, "a", layer.name, rank, seed)
            factors[Key(layer.name, "b")] = torch.zeros(layer.d_out, rank)
    return factors | dict(head)


def derived_factors(
    layout: Layout, rank: int, *, seed: int, basis: Basis, core: bool, given: bool
) -> dict[Key, Tensor]:
    """What a client of this rank starts from, as far as both ends derive it from the seed alone. W starts at 0.

    That is neither a head, which the model has, nor what is made of the model's weights, of the clients' gradients or
    of a PEFT adapter.

    Args:
        layout: The client's tensors.
        rank: The client's rank.
        seed: The run's seed.
        basis: Where A comes from.
        core: Whether B comes from there too.
        given: Whether A and B are those of a PEFT adapter.
    """
    drawn = basis in ("kaiming", "orthonormal")
    factors = initial_factors(layout, {}, rank=rank, seed=seed, basis=basis if drawn else "kaiming", core=core)
    if "W" in layout.extra:
        factors |= {Key(layer.name, "W"): torch.zeros(layer.d_out, layer.d_in) for layer in layout.layers}
    known = frozenset("" if given or (core and not drawn) else "AB" if drawn else "B")
    return {key: value for key, value in factors.items() if key.factor not in "AB" or key.factor in known}


def _basis(
    layer: Layer, rank: int, seed: int, basis: Basis, weight: Weight | None
) -> tuple[Float[Tensor, "rank d_in"], Float[Tensor, "d_out rank"]]:
    if basis == "weights":
        assert weight is not None
        U, _, V = leading(weight(layer.name), rank, generator(seed, "weights", layer.name))
        return V.mT.float().contiguous(), U.float()
    if basis == "orthonormal":
        A = _orthonormal(layer.d_in, rank, generator(seed, "A", layer.name)).mT.contiguous()
        return A, _orthonormal(layer.d_out, rank, generator(seed, "B", layer.name))
    A = _kaiming(layer.d_in, "A", layer.name, rank, seed)
    return A, _kaiming(layer.d_out, "B", layer.name, rank, seed).mT.contiguous()


def _kaiming(d: int, factor: str, layer: str, rank: int, seed: int) -> Float[Tensor, "rank d"]:
    return nn.init.kaiming_uniform_(torch.empty(rank, d), a=math.sqrt(5), generator=generator(seed, factor, layer))


def _orthonormal(d: int, rank: int, rng: torch.Generator) -> Float[Tensor, "d rank"]:
    columns = [torch.randn(d, generator=rng, dtype=torch.float64) for _ in range(rank)]
    return torch.linalg.qr(torch.stack(columns, 1)).Q.float()
