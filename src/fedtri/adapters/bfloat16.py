"""Mixed precision: products with frozen linear layers in bfloat16, everything else, what learns too, in float32.

A frozen layer keeps its weight in bfloat16. What it gives is float32 again, but where an activation alone stands
between it and the next product, as in a transformer's feed-forward part: there it stays bfloat16, as under
torch.autocast.
"""

from collections.abc import Collection
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from fedtri.errors import FedtriError

ROWS = 32
"""On a processor a bfloat16 product's rows are filled up to a multiple of this: a shape that was not met before costs
oneDNN 0.6 ms, longer than the product."""


class Bfloat16Linear(nn.Module):
    """A frozen nn.Linear whose product is in bfloat16."""

    def __init__(self, base: nn.Linear, *, narrow: bool) -> None:
        """`narrow`: its output stays in bfloat16; else it is float32 again."""
        super().__init__()
        self.in_features, self.out_features, self.narrow = base.in_features, base.out_features, narrow
        self.weight = nn.Parameter(base.weight.detach().bfloat16(), requires_grad=False)
        bias = None if base.bias is None else nn.Parameter(base.bias.detach().bfloat16(), requires_grad=False)
        self.bias = bias

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        flat = x.reshape(-1, x.shape[-1])
        out = torch.bfloat16 if self.narrow else torch.float32
        return _Product.apply(flat, self.weight, self.bias, out).view(*x.shape[:-1], -1)  # pyright: ignore


def narrow_products(model: nn.Module, adapted: Collection[str]) -> None:
    """Replace a model's linear layers by ones that multiply in bfloat16; `adapted` names those beneath an adapter.

    Raises FedtriError for a model that is not in float32.
    """
    found = {name: module for name, module in model.named_modules() if type(module) is nn.Linear}
    if other := {one.weight.dtype for one in found.values()} - {torch.float32}:
        raise FedtriError(
            "model_options.mixed_precision: expected a model in float32, "
            f'got {str(other.pop()).removeprefix("torch.")}; set model_options.dtype = "float32", or leave it out'
        )
    narrow = _before_an_activation(model, {found[name] for name in adapted if name in found})
    for name, module in found.items():
        model.set_submodule(name, Bfloat16Linear(module, narrow=module in narrow))


def _before_an_activation(model: nn.Module, adapted: set[nn.Linear]) -> set[nn.Linear]:
    """The layers with an activation alone between them and a product: the widest of their block, and others in it take
    that width, none of which is adapted. Attention's may be wider than what enters them, but are not the widest.
    """
    found: set[nn.Linear] = set()
    blocks = [block for blocks in model.modules() if isinstance(blocks, nn.ModuleList) for block in blocks]
    for block in blocks:
        linears = [one for one in block.modules() if type(one) is nn.Linear]
        wider = [one for one in linears if one.out_features > one.in_features]
        taken = {one.in_features for one in linears} & {one.out_features for one in wider}
        widest = max(taken, default=0)
        takers = {one for one in linears if one.in_features == widest}
        found |= {one for one in wider if one.out_features == widest and not {one, *takers} & adapted}
    return found


def product(
    x: Float[Tensor, "n d_in"], weight: Float[Tensor, "d_out d_in"], bias: Tensor | None
) -> Float[Tensor, "n d_out"]:
    """W x + b in the weight's type."""
    return linear(_factor(x, weight.dtype), weight, bias)[: len(x)]


def gradient(dy: Float[Tensor, "n d_out"], weight: Float[Tensor, "d_out d_in"]) -> Float[Tensor, "n d_in"]:
    """Wᵀ dy in the weight's type."""
    return (_factor(dy, weight.dtype) @ weight)[: len(dy)]


def _factor(x: Float[Tensor, "n d"], dtype: torch.dtype) -> Float[Tensor, "m d"]:
    """What is to be multiplied in its partner's type, its rows filled up with zeros where that saves time."""
    rows = -(-len(x) // ROWS) * ROWS
    if dtype != torch.bfloat16 or x.device.type != "cpu" or rows == len(x):
        return x.to(dtype)
    filled = x.new_empty(rows, x.shape[1], dtype=dtype)
    filled[: len(x)].copy_(x)
    filled[len(x) :].zero_()
    return filled


class _Product(torch.autograd.Function):
    """A frozen layer's product, whatever the type of what comes in."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, out: torch.dtype) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.dtype = x.dtype
        return product(x, weight, bias).to(out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        (weight,) = ctx.saved_tensors
        return gradient(dy, weight).to(ctx.dtype), None, None, None
