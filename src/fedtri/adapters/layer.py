"""What an adapted layer computes: y = W0 x + s · B C A x, with one client's factors beside a frozen linear layer.

Two more kinds: DoRA, y = M ∘ (W0 + s B C A) x / ‖W0 + s B C A‖ with a norm for each row (arXiv:2402.09353), and HiRA,
y = (W0 + W0 ∘ s B C A) x (openreview.net/forum?id=TwJrTz9cRS). A dense W, where a client has one, adds W x. A second
adapter adds s · b a x. `adapt` is the one place that says all this.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers.pytorch_utils import Conv1D

from fedtri.adapters.bfloat16 import Bfloat16Linear
from fedtri.adapters.factors import block_diagonal

Kind = Literal["lora", "dora", "hira"]


@dataclass(frozen=True)
class LayerFactors:
    """One client's tensors of one adapted layer, at its own rank; C as the blocks on its diagonal."""

    A: Float[Tensor, "r d_in"]
    C: Float[Tensor, "r block"]
    B: Float[Tensor, "d_out r"]
    scale: float
    """s = alpha / r."""
    S: Float[Tensor, "heads"] | None = None
    M: Float[Tensor, "d_out"] | None = None
    W: Float[Tensor, "d_out d_in"] | None = None
    a: Float[Tensor, "r d_in"] | None = None
    b: Float[Tensor, "d_out r"] | None = None

    def product(self) -> tuple[Float[Tensor, "k d_in"], Float[Tensor, "k k"], Float[Tensor, "d_out k"]]:
        """(A, s·C, B) whose product B C A is the layer's whole update of low rank: of two adapters, [A; a],
        s·blockdiag(C, I) and [B b].
        """
        core = self.C * self.scale
        if self.S is not None:
            core = (core.unflatten(0, (len(self.S), -1)) * self.S[:, None, None]).flatten(0, 1)
        if core.shape[0] != core.shape[1]:
            core = block_diagonal(core)
        if self.a is None or self.b is None:
            return self.A, core, self.B
        second = torch.eye(len(self.a), dtype=core.dtype, device=core.device) * self.scale
        return torch.cat([self.A, self.a]), torch.block_diag(core, second), torch.cat([self.B, self.b], 1)


@dataclass(frozen=True)
class HeadFactors:
    """One client's copy of a linear layer of the head; where it has only some of the classes, their rows alone."""

    weight: Float[Tensor, "own d_in"]
    bias: Float[Tensor, "own"] | None = None
    classes: Int[Tensor, "own"] | None = None
    """Which of the layer's outputs the rows are; None: all of them."""


def adapt(
    y: Float[Tensor, "*batch d_out"],
    x: Float[Tensor, "*batch d_in"],
    layer: "AdaptedLinear",
    own: LayerFactors,
) -> Float[Tensor, "*batch d_out"]:
    """One client's output of a layer.

    Args:
        y: What the frozen layer makes of x, its bias included.
        x: The layer's input.
        layer: The frozen layer and the kind of its adapter.
        own: The client's tensors of this layer.
    """
    A, core, B = own.product()
    rows = x.to(A.dtype)
    if layer.kind == "hira":
        update = rows @ (weight_of(layer.base).to(A.dtype) * (B @ core @ A)).mT
    else:
        update = rows @ A.mT @ core.mT @ B.mT
    if own.W is not None:
        update = update + rows @ own.W.mT
    if layer.kind == "lora" or layer.kind == "hira":
        return y + update.to(y.dtype)
    return _dora(y, update, layer, own, (A, core, B))


def _dora(
    y: Tensor, update: Tensor, layer: "AdaptedLinear", own: LayerFactors, factors: tuple[Tensor, Tensor, Tensor]
) -> Tensor:
    """M / ‖W‖ · W x + bias; the norm is a constant to the gradient, as in DoRA's section 4.3 and in PEFT.

    ‖w + bᵀCA‖² of a row = ‖w‖² + 2 wᵀ(CA)ᵀb + bᵀ(CA)(CA)ᵀb: no d_out × d_in matrix is built.
    """
    assert own.M is not None
    with torch.no_grad():
        A, core, B = factors
        CA = core @ A
        cross = weight_of(layer.base).to(CA.dtype) @ CA.mT  # (d_out, r)
        squares = layer.squares + (B * (2 * cross + B @ (CA @ CA.mT))).sum(-1)
        norm = squares.clamp(min=0).sqrt()
    gain, bias = own.M / norm, getattr(layer.base, "bias", None)
    if bias is None:
        return (gain * (y + update)).to(y.dtype)
    return (gain * (y - bias + update) + bias).to(y.dtype)


class AdaptedLinear(nn.Module):
    """A frozen linear layer with the adapter of one client at a time; without one it is the frozen layer."""

    def __init__(self, base: nn.Module, name: str, kind: Kind) -> None:
        """`name` is the layer's name in the Layout."""
        super().__init__()
        self.base, self.name, self.kind = base, name, kind
        self.scale = 0.0
        self.factors = nn.ParameterDict()
        """The client's own tensors, by factor; empty where there is no client."""
        self.squares: Tensor
        if kind == "dora":
            weight = weight_of(base)
            norms = torch.linalg.vector_norm(weight.to(precision(weight)), dim=1)
            self.register_buffer("squares", norms**2, persistent=False)

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        y = self.base(x)
        if not self.factors:
            return y
        return adapt(y, x, self, LayerFactors(**dict(self.factors.items()), scale=self.scale))


class HeadLinear(nn.Module):
    """A linear layer of the head, of one client at a time; before there is one, as the model was loaded."""

    def __init__(self, base: nn.Linear, name: str) -> None:
        super().__init__()
        self.name, self.out_features = name, base.out_features
        dtype = precision(base.weight)
        self.weight = nn.Parameter(base.weight.detach().to(dtype), requires_grad=False)
        bias = None if base.bias is None else nn.Parameter(base.bias.detach().to(dtype), requires_grad=False)
        self.bias = bias
        self.classes: Tensor | None = None

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        return headed(x, HeadFactors(self.weight, self.bias, self.classes), self.out_features)


def headed(x: Float[Tensor, "*batch d_in"], own: HeadFactors, width: int) -> Float[Tensor, "*batch width"]:
    """One client's output of a layer of the head: -inf for classes that it does not have."""
    y = linear(x.to(own.weight.dtype), own.weight, own.bias)
    if own.classes is None:
        return y
    return y.new_full((*y.shape[:-1], width), -math.inf).index_copy(-1, own.classes, y)


def precision(weight: Tensor) -> torch.dtype:
    """The number type of what learns beside a weight: float32 where that is kept in fewer bits."""
    return torch.promote_types(weight.dtype, torch.float32)


def shape_of(layer: nn.Module) -> tuple[int, int]:
    """(d_out, d_in) of a linear layer, however its weight is kept, or of GPT-2's Conv1D, which keeps it transposed."""
    if isinstance(layer, nn.Linear | Bfloat16Linear):
        return layer.out_features, layer.in_features
    weight = layer.weight
    assert isinstance(weight, Tensor)
    columns, rows = weight.shape
    return rows, columns


def plain(module: nn.Module) -> bool:
    """Whether all weights are numbers that one can calculate with, not 8 or 4 bits in a format of their own."""
    return all(value.is_floating_point() for value in module.parameters())


def weight_of(layer: nn.Module) -> Float[Tensor, "d_out d_in"]:
    """W0 as (d_out, d_in), a view where it is kept transposed."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return (weight.mT if isinstance(layer, Conv1D) else weight).detach()
