"""Linear layers over the tokens of several clients: one product with the frozen weight, and each client's own factors.

The tokens of a client are one run of a matrix's rows. Its factors meet that run alone, so no client's numbers reach
another's.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from fedtri.adapters.bfloat16 import gradient, product
from fedtri.adapters.layer import AdaptedLinear, HeadLinear, adapt, headed, weight_of
from fedtri.adapters.model import Adapter


@dataclass(frozen=True)
class Runs:
    """Which rows of a matrix are whose."""

    adapters: tuple[Adapter, ...]
    """Each run's client; empty where no row has an adapter."""
    bounds: tuple[tuple[int, int], ...]
    """First row of each run, and one past its last."""


def apply(layer: Any, x: Float[Tensor, "n d_in"], runs: Runs) -> Float[Tensor, "n d_out"]:
    """What a linear layer makes of these rows, each with its own client's factors.

    Args:
        layer: A frozen layer, an AdaptedLinear, or a HeadLinear; whatever the modules carry, the runs' adapters count.
    """
    if isinstance(layer, HeadLinear):
        parts = [
            headed(x[start:stop], own.head[layer.name], layer.out_features)
            for own, (start, stop) in zip(runs.adapters, runs.bounds, strict=True)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)
    if not isinstance(layer, AdaptedLinear):
        return layer(x)
    if not runs.adapters:
        return layer.base(x)
    owns = [own.layers[layer.name] for own in runs.adapters]
    weight = weight_of(layer.base)
    if layer.kind == "lora" and all(own.W is None for own in owns) and x.dtype == owns[0].A.dtype:
        factors = [factor for own in owns for factor in own.product()]
        bias: Any = layer.base.bias
        return ByClient.apply(x, weight, bias, runs.bounds, *factors)  # pyright: ignore
    y = layer.base(x)
    parts = [
        adapt(y[start:stop], x[start:stop], layer, own) for own, (start, stop) in zip(owns, runs.bounds, strict=True)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


class ByClient(torch.autograd.Function):
    """y = W0 x + bias + B C A x, run of rows by run of rows: what is added is added in place, forward and backward."""

    @staticmethod
    def forward(
        ctx: Any, x: Float[Tensor, "n d_in"], W0: Tensor, bias: Tensor | None, bounds: Sequence[tuple[int, int]],
        *factors: Tensor,
    ) -> Float[Tensor, "n d_out"]:  # fmt: skip
        """`factors` are A, C, B of one run after the other, the scale in C."""
        y = product(x, W0, bias).to(x.dtype)
        between = []
        for (start, stop), A, C, B in zip(bounds, factors[::3], factors[1::3], factors[2::3], strict=True):
            h = x[start:stop] @ A.mT
            z = h @ C.mT
            y[start:stop].addmm_(z, B.mT)
            between += [h, z]
        ctx.bounds = bounds
        ctx.save_for_backward(x, W0, *factors, *between)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Float[Tensor, "n d_out"]) -> tuple[Tensor | None, ...]:  # pyright: ignore
        x, W0, *saved = ctx.saved_tensors
        factors, between = saved[: 3 * len(ctx.bounds)], saved[3 * len(ctx.bounds) :]
        wants_x, wants = ctx.needs_input_grad[0], ctx.needs_input_grad[4:]
        dx = gradient(dy, W0).to(dy.dtype) if wants_x else None
        found: list[Tensor | None] = []
        for run, (start, stop) in enumerate(ctx.bounds):
            (A, C, B), (h, z) = factors[3 * run : 3 * run + 3], between[2 * run : 2 * run + 2]
            wants_A, wants_C, wants_B = wants[3 * run : 3 * run + 3]
            part = dy[start:stop]
            dz = part @ B
            dh = dz @ C
            if dx is not None:
                dx[start:stop].addmm_(dh, A)
            found += [
                dh.mT @ x[start:stop] if wants_A else None, dz.mT @ h if wants_C else None,
                part.mT @ z if wants_B else None,
            ]  # fmt: skip
        return (dx, None, None, None, *found)
