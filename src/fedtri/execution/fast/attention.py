"""Attention over texts that lie end to end: they are apart here, and nowhere else in a layer.

Tokens are gathered into short rows (packing.py), attend under a mask that keeps each text to itself, and are taken out
again. Queries may be fewer than keys: in the last layer only tokens that are read ask.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import scaled_dot_product_attention

WRITTEN_OUT = 96
"""Up to this width attention is two plain products and a softmax; PyTorch's fused kernel is faster on wider rows."""


@dataclass(frozen=True)
class Laid:
    """How tokens of several heads are laid into rows: (tokens · heads, d) as (rows, heads, width), and back."""

    spread: Int[Tensor, "rows_heads_width"]
    """Which of the tokens' heads a place holds. Of grouped heads, keys and values are held once for each query head."""
    collected: Int[Tensor, "tokens_heads"]
    """In which place each token's head is, for each query head."""
    shape: tuple[int, int, int]
    """(rows, heads, width)."""
    groups: int = 1
    """Query heads that share a key and value head."""


def laid(source: Int[Tensor, "rows width"], places: Int[Tensor, "tokens"], heads: int, groups: int = 1) -> Laid:
    """The indices of rows in which place (i, j) holds token source[i, j], and token t is in place places[t]."""
    rows, width = source.shape
    head = torch.arange(heads, device=source.device)
    spread = source[:, None] * (heads // groups) + (head // groups)[:, None]
    collected = (places // width * (heads * width) + places % width)[:, None] + head * width
    return Laid(spread.flatten(), collected.flatten(), (rows, heads, width), groups)


@dataclass(frozen=True)
class Attending:
    """Who attends to whom in one layer."""

    queries: Laid
    keys: Laid
    masks: Mapping[int | None, Float[Tensor, "rows #heads queries width"]]
    """0 where a token may look, the type's least number where not, with a bias by distance where the model has one; by
    how far back a layer's tokens look (None: as far as the text goes)."""


def attend(
    query: Float[Tensor, "asking heads_d"],
    key: Float[Tensor, "tokens key_heads_d"],
    value: Float[Tensor, "tokens key_heads_d"],
    where: Attending,
    scale: float,
    window: int | None = None,
) -> Float[Tensor, "asking heads_d"]:
    """softmax(scale · Q Kᵀ + mask) V for every text and head."""
    heads = where.queries.shape[1]
    d = query.shape[1] // heads
    q, k, v = _spread(query, d, where.queries), _spread(key, d, where.keys), _spread(value, d, where.keys)
    mask = where.masks[window]
    plain = k.shape[2] <= WRITTEN_OUT and q.device.type == "cpu" and q.dtype in (torch.float32, torch.float64)
    if plain and not mask.requires_grad:
        out: Tensor = _WrittenOut.apply(q, k, v, mask, scale)  # pyright: ignore
    else:
        out = scaled_dot_product_attention(q, k, v, mask, scale=scale)
    return _Collect.apply(out, where.queries).view(len(query), -1)  # pyright: ignore


def _spread(x: Float[Tensor, "tokens heads_d"], d: int, rows: Laid) -> Float[Tensor, "rows heads width d"]:
    return _Spread.apply(x.reshape(-1, d), rows).view(*rows.shape, d)  # pyright: ignore


class _Spread(torch.autograd.Function):
    """Tokens laid into their places. A place that holds none has a copy of its row's first, so that it is of the same
    client; no gradient comes back from it.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Laid) -> Tensor:
        ctx.rows = rows
        return x.index_select(0, rows.spread)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        rows: Laid = ctx.rows
        dx = dy.index_select(0, rows.collected)
        return dx if rows.groups == 1 else dx.view(-1, rows.groups, dx.shape[1]).sum(1), None


class _Collect(torch.autograd.Function):
    """Tokens taken out of their places: (rows, heads, width, d) to (tokens · heads, d)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Laid) -> Tensor:
        ctx.rows, ctx.shape = rows, x.shape
        return x.reshape(-1, x.shape[-1]).index_select(0, rows.collected)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        dx = dy.new_zeros(len(ctx.rows.spread), dy.shape[1])  # a place that holds no token caused nothing
        return dx.index_copy_(0, ctx.rows.collected, dy).view(ctx.shape), None


class _WrittenOut(torch.autograd.Function):
    """softmax(scale · Q Kᵀ + mask) V by plain products over all rows and heads, in place where nothing is lost.

    Backward: with P the softmax, O the output and D = Σ dO ∘ O by query, dS = P ∘ (dO Vᵀ − D), as in FlashAttention
    (arXiv:2205.14135, appendix B.2).
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        q, k, v = (x.flatten(0, 1) for x in (query, key, value))
        scores = _scaled(q, k.mT, scale)
        scores.view(*query.shape[:3], -1).add_(mask)
        share = torch.softmax(scores, -1, out=scores)
        out = torch.bmm(share, v)
        ctx.save_for_backward(q, k, v, share, out)
        return out.view(query.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        q, k, v, share, out = ctx.saved_tensors
        shape, dy = dy.shape, dy.reshape(q.shape)
        dv = torch.bmm(share.mT, dy)
        d = (dy * out).sum(-1, keepdim=True)
        d_scores = torch.baddbmm(d, dy, v.mT, beta=-1).mul_(share)
        dq, dk = _scaled(d_scores, k, ctx.scale), _scaled(d_scores.mT, q, ctx.scale)
        keys = (*shape[:2], *k.shape[1:])
        return dq.view(shape), dk.view(keys), dv.view(keys), None, None


def _scaled(x: Float[Tensor, "n i j"], y: Float[Tensor, "n j k"], scale: float) -> Float[Tensor, "n i k"]:
    """scale · x y."""
    return torch.baddbmm(x.new_empty(()), x, y, beta=0, alpha=scale)
