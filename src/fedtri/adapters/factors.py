"""What one client's factors stand for: C and S as a square core, B C A as one update of a layer."""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from fedtri.adapters.layout import Factors, Key


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
    """s · (B C A + b a) of one client's layer, dense and without its W: for tests and merging, never for the server."""
    update = factors[Key(layer, "B")] @ core_of(factors, layer) @ factors[Key(layer, "A")]
    if (second := Key(layer, "a")) in factors:
        update = update + factors[Key(layer, "b")] @ factors[second]
    return scale * update


def block_diagonal(blocks: Float[Tensor, "*batch r b"]) -> Float[Tensor, "*batch r r"]:
    """The square matrix with these blocks, given one under the other, along its diagonal."""
    r, b = blocks.shape[-2:]
    eye = torch.eye(r // b, dtype=blocks.dtype, device=blocks.device)
    spread = blocks.unflatten(-2, (r // b, b))[..., None, :] * eye[:, None, :, None]  # (..., heads, b, heads, b)
    return spread.flatten(-2).flatten(-3, -2)
