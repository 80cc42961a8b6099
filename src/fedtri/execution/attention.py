"""Attention over texts that lie end to end in one row (packing.py): they are apart here, and nowhere else in a layer.

A layer's matrix products then see real tokens only, and none is spent on places that hold none. Attention lays the
tokens into short rows, as many of a client's texts in each as fit, under a mask that keeps each text to itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "fedtri"
"""What transformers' models call this attention by."""
WIDTH = 16
"""Rows are as wide as a multiple of this: a processor's vectors hold so many numbers, and what remains is slow."""
WRITTEN_OUT = 96
"""Up to this width attention is two plain products and a softmax; PyTorch's fused kernel is faster on wider rows."""


@dataclass(frozen=True)
class TextRows:
    """Where attention puts the tokens of a row of texts: into places of (rows, width)."""

    source: Int[Tensor, "rows width"]
    """Which token a place holds; the first of its row where it holds none."""
    places: Int[Tensor, "tokens"]
    """In which place, of all rows end to end, each token is."""
    mask: Float[Tensor, "rows 1 width width"]
    """0 where a token may look and the type's least number where not: places that hold none look at such alone."""
    _indices: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def indices(self, heads: int) -> tuple[Int[Tensor, "spread"], Int[Tensor, "collected"]]:
        """The same for every head: (tokens · heads, d) laid out as (rows, heads, width), and back."""
        if heads not in self._indices:
            head, width = torch.arange(heads, device=self.source.device), self.source.shape[1]
            spread = self.source[:, None] * heads + head[:, None]
            collected = (self.places // width * (heads * width) + self.places % width)[:, None] + head * width
            self._indices[heads] = spread.flatten(), collected.flatten()
        return self._indices[heads]


def adopt(model: nn.Module) -> bool:
    """Let a model's attention be ours, where it is PyTorch's by transformers' interface; returns whether it is."""
    if getattr(getattr(model, "config", None), "_attn_implementation", None) != "sdpa":
        return False
    model.set_attn_implementation(NAME)  # pyright: ignore
    return model.config._attn_implementation == NAME  # pyright: ignore


def leave(model: nn.Module) -> None:
    """Give a model PyTorch's attention back."""
    model.set_attn_implementation("sdpa")  # pyright: ignore


def attend(
    module: nn.Module,
    query: Float[Tensor, "batch heads tokens d"],
    key: Float[Tensor, "batch key_heads key_tokens d"],
    value: Float[Tensor, "batch key_heads key_tokens d_value"],
    attention_mask: Tensor | None,
    *,
    text_rows: TextRows | None = None,
    **kwargs: Any,
) -> tuple[Float[Tensor, "batch tokens heads d_value"], None]:
    """What transformers' layers call: attention in rows where packing.py says which, else PyTorch's as it comes."""
    if text_rows is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    rows = [_spread(one, text_rows) for one in (query, key, value)]
    if _plain(rows, kwargs):
        out = _WrittenOut.apply(*rows, text_rows.mask, kwargs.get("scaling") or query.shape[-1] ** -0.5)
    else:
        out = sdpa_attention_forward(module, *rows, text_rows.mask, **kwargs)[0].transpose(1, 2)  # pyright: ignore
    return _Collect.apply(out, *text_rows.indices(query.shape[1])).unflatten(0, (1, -1)), None  # pyright: ignore


def _plain(rows: Sequence[Tensor], kwargs: dict[str, Any]) -> bool:
    """Whether attention is softmax(scale · Q Kᵀ + mask) V and no more, of a width at which writing it out is faster."""
    query, key, value = rows
    return (
        query.shape == key.shape == value.shape
        and query.shape[2] <= WRITTEN_OUT
        and query.device.type == "cpu"
        and query.dtype in (torch.float32, torch.float64)
        and not kwargs.get("dropout")
        and all(kwargs.get(name) is None for name in ("position_bias", "softcap", "s_aux"))
    )


def _spread(x: Float[Tensor, "1 heads tokens d"], rows: TextRows) -> Float[Tensor, "rows heads width d"]:
    heads, d = x.shape[1], x.shape[3]
    spread: Tensor = _Spread.apply(x.transpose(1, 2).reshape(-1, d), *rows.indices(heads))  # pyright: ignore
    return spread.view(len(rows.source), heads, -1, d)


class _Spread(torch.autograd.Function):
    """Tokens laid into their places. One that holds none has a copy of its row's first; it tells no other, so that no
    gradient passes between them.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, spread: Tensor, collected: Tensor) -> Tensor:
        ctx.save_for_backward(collected)
        return x.index_select(0, spread)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        return dy.index_select(0, ctx.saved_tensors[0]), None, None


class _Collect(torch.autograd.Function):
    """Tokens taken out of their places: (rows, heads, width, d) to (tokens, heads, d)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, spread: Tensor, collected: Tensor) -> Tensor:
        ctx.save_for_backward(spread)
        ctx.shape = x.shape
        return x.reshape(-1, x.shape[-1]).index_select(0, collected).view(-1, x.shape[1], x.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        return dy.reshape(-1, dy.shape[-1]).index_select(0, ctx.saved_tensors[0]).view(ctx.shape), None, None


class _WrittenOut(torch.autograd.Function):
    """softmax(scale · Q Kᵀ + mask) V by plain products over all rows and heads, in place where nothing is lost."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
        ctx.shape, ctx.scale = query.shape, scale
        q, k, v = (x.flatten(0, 1) for x in (query, key, value))
        scores = _scaled(q, k.mT, scale)
        scores.view(*query.shape[:3], -1).add_(mask)
        share = torch.softmax(scores, -1, out=scores)
        ctx.save_for_backward(q, k, v, share)
        return torch.bmm(share, v).view(query.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        q, k, v, share = ctx.saved_tensors
        dy = dy.reshape(v.shape)
        dv = torch.bmm(share.mT, dy)
        d_share = torch.bmm(dy, v.mT)
        d_scores = torch._softmax_backward_data(d_share, share, -1, share.dtype, grad_input=d_share)
        dq, dk = _scaled(d_scores, k, ctx.scale), _scaled(d_scores.mT, q, ctx.scale)
        return *(x.view(ctx.shape) for x in (dq, dk, dv)), None, None


def _scaled(x: Float[Tensor, "n i j"], y: Float[Tensor, "n j k"], scale: float) -> Float[Tensor, "n i k"]:
    """scale · x y."""
    return torch.baddbmm(x.new_empty(()), x, y, beta=0, alpha=scale)


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)
