"""One client's factors: what they start from, and what B, C, A, S of a layer stand for."""

import math
from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fedtri.adapters.layout import Factors, Key, Layout
from fedtri.seeds import generator


def initial_factors(
    layout: Layout, head: Factors, *, rank: int, seed: int, basis: str = "kaiming"
) -> dict[Key, Tensor]:
    """What every client starts from, derived from the run's seed and never sent.

    "kaiming": A Kaiming-uniform as in PEFT, C = I, B = 0. "orthonormal": rows of A and columns of B orthonormal,
    C = 0. Either way ΔW = 0. The rows of a smaller rank are the first rows of a larger one. S = 1.
    """
    factors: dict[Key, Tensor] = {}
    for layer in layout.layers:
        if basis == "orthonormal":
            A = _orthonormal(layer.d_in, rank, generator(seed, "A", layer.name)).mT.contiguous()
            B = _orthonormal(layer.d_out, rank, generator(seed, "B", layer.name))
            C = torch.zeros(rank, rank // layout.heads)
        else:
            A, B, C = torch.empty(rank, layer.d_in), torch.zeros(layer.d_out, rank), torch.eye(rank)
            nn.init.kaiming_uniform_(A, a=math.sqrt(5), generator=generator(seed, "A", layer.name))
        factors |= {Key(layer.name, "A"): A, Key(layer.name, "C"): C, Key(layer.name, "B"): B}
        if "S" in layout.extra:
            factors[Key(layer.name, "S")] = torch.ones(layout.heads)
    return factors | dict(head)


def _orthonormal(d: int, rank: int, rng: torch.Generator) -> Float[Tensor, "d rank"]:
    columns = [torch.randn(d, generator=rng, dtype=torch.float64) for _ in range(rank)]
    return torch.linalg.qr(torch.stack(columns, 1)).Q.float()


def folded(factors: Factors) -> dict[Key, Tensor]:
    """The same tensors with every S multiplied into its C: s_iH_i is what RAVAN sends."""
    result = dict(factors)
    for key in [key for key in factors if key.factor == "S"]:
        core = Key(key.layer, "C")
        blocks = factors[core].unflatten(0, (len(factors[key]), -1)) * factors[key][:, None, None]
        result |= {core: blocks.flatten(0, 1), key: torch.ones_like(factors[key])}
    return result


def core_of(factors: Factors, layer: str) -> Float[Tensor, "r r"]:
    """C of one client's layer as the square matrix it stands for, S multiplied in."""
    own = folded({key: value for key, value in factors.items() if key.layer == layer and key.factor in "CS"})
    return block_diagonal(own[Key(layer, "C")])


def effective_update(factors: Mapping[Key, Tensor], layer: str, scale: float) -> Float[Tensor, "d_out d_in"]:
    """s · B C A of one client's layer, dense and without its W: for tests and for merging, never for the server."""
    return scale * (factors[Key(layer, "B")] @ core_of(factors, layer) @ factors[Key(layer, "A")])


def block_diagonal(blocks: Float[Tensor, "*batch r b"]) -> Float[Tensor, "*batch r r"]:
    """The square matrix with these blocks, given one under the other, along its diagonal."""
    r, b = blocks.shape[-2:]
    eye = torch.eye(r // b, dtype=blocks.dtype, device=blocks.device)
    spread = blocks.unflatten(-2, (r // b, b))[..., None, :] * eye[:, None, :, None]  # (..., heads, b, heads, b)
    return spread.flatten(-2).flatten(-3, -2)
