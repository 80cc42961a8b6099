"""Llama and its kin, GPT-2 and GPT-NeoX, written out: layers that look back, and what stands on them.

h = x + output(attention(query(norm x), key(norm x), value(norm x)))
y = h + down(activation(gate(norm h)) · up(norm h))
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from fedtri.execution.fast.architecture import Architecture, Head
from fedtri.execution.fast.attention import attend
from fedtri.execution.fast.linear import Runs
from fedtri.execution.fast.linear import apply as linear
from fedtri.execution.fast.passes import Pass, Shape, View

Rotary = tuple[Float[Tensor, "tokens 1 turned"], Float[Tensor, "tokens 1 turned"]]
"""Cosine and sine of each token's rotation."""


def llama_layer(
    window: Callable[[Any], int | None],
) -> Callable[[Any, Float[Tensor, "n d"], View, Rotary], Float[Tensor, "m d"]]:
    """A layer of Llama, Mistral, Qwen and Gemma; `window` says how far back an attention module looks."""

    def run(layer: Any, x: Float[Tensor, "n d"], view: View, rotary: Rotary) -> Float[Tensor, "m d"]:
        own, normed, kept = layer.self_attn, layer.input_layernorm(x), view.kept(x)
        query = linear(own.q_proj, view.kept(normed), view.leaving).unflatten(1, (-1, own.head_dim))
        key = linear(own.k_proj, normed, view.entering).unflatten(1, (-1, own.head_dim))
        value = linear(own.v_proj, normed, view.entering)
        if hasattr(own, "q_norm"):
            query, key = own.q_norm(query), own.k_norm(key)
        query, key = _turned(query, key, view, rotary)
        found = attend(query, key, value, view.attending, own.scaling, window(own))
        h = kept + linear(own.o_proj, found, view.leaving)
        mlp, inner = layer.mlp, layer.post_attention_layernorm(h)
        gate = mlp.act_fn(linear(mlp.gate_proj, inner, view.leaving))
        return h + linear(mlp.down_proj, gate * linear(mlp.up_proj, inner, view.leaving), view.leaving)

    return run


def gpt_neox_layer(layer: Any, x: Float[Tensor, "n d"], view: View, rotary: Rotary) -> Float[Tensor, "m d"]:
    """A layer of GPT-NeoX and Pythia: query, key and value of one product, head by head."""
    own, kept = layer.attention, view.kept(x)
    fused = linear(own.query_key_value, layer.input_layernorm(x), view.entering).unflatten(1, (-1, 3 * own.head_size))
    query, key, value = fused.chunk(3, -1)
    query = view.kept(query.flatten(1)).unflatten(1, query.shape[1:])
    query, key = _turned(query, key, view, rotary)
    found = linear(own.dense, attend(query, key, value.flatten(1), view.attending, own.scaling), view.leaving)
    h = kept if layer.use_parallel_residual else kept + found
    mlp = layer.mlp
    inner = mlp.act(linear(mlp.dense_h_to_4h, layer.post_attention_layernorm(h), view.leaving))
    return kept + found + linear(mlp.dense_4h_to_h, inner, view.leaving)


def gpt2_layer(layer: Any, x: Float[Tensor, "n d"], view: View, _: None) -> Float[Tensor, "m d"]:
    """A layer of GPT-2: query, key and value of one product, end to end."""
    own, kept = layer.attn, view.kept(x)
    query, key, value = linear(own.c_attn, layer.ln_1(x), view.entering).chunk(3, 1)
    found = attend(view.kept(query), key, value, view.attending, own.scaling)
    h = kept + linear(own.c_proj, found, view.leaving)
    inner = layer.mlp.act(linear(layer.mlp.c_fc, layer.ln_2(h), view.leaving))
    return h + linear(layer.mlp.c_proj, inner, view.leaving)


def _turned(
    query: Float[Tensor, "m heads d"], key: Float[Tensor, "n key_heads d"], view: View, rotary: Rotary
) -> tuple[Float[Tensor, "m heads_d"], Float[Tensor, "n key_heads_d"]]:
    """Query and key turned by their positions, the first numbers of each head where a model turns only some."""
    cos, sin = rotary
    asking = (cos, sin) if view.read is None else (cos[view.read], sin[view.read])
    return _turn(query, *asking).flatten(1), _turn(key, cos, sin).flatten(1)


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE (arXiv:2104.09864) as Llama has it: the second half of what is turned is the first's partner."""
    width = cos.shape[-1]
    turned, rest = (x, None) if width == x.shape[-1] else (x[..., :width], x[..., width:])
    first, second = turned.chunk(2, -1)
    turned = turned * cos + torch.cat([-second, first], -1) * sin
    return turned if rest is None else torch.cat([turned, rest], -1)


def _rotary(backbone: Any, at: Pass) -> Rotary:
    like = next(backbone.get_input_embeddings().parameters())
    cos, sin = backbone.rotary_emb(like, at.positions[None])
    return cos[0][:, None], sin[0][:, None]


def _shape(windows: Callable[[Any], frozenset[int | None]]) -> Callable[[Any], Shape]:
    def shape(backbone: Any) -> Shape:
        config = backbone.config
        heads = config.num_attention_heads
        groups = heads // (getattr(config, "num_key_value_heads", None) or heads)
        dtype = next(backbone.get_input_embeddings().parameters()).dtype
        return Shape(heads=heads, groups=groups, causal=True, windows=windows(backbone), dtype=dtype)

    return shape


def _no_window(attention: Any) -> None:
    return None


def _configs_window(attention: Any) -> int | None:
    return attention.config.sliding_window


def _own_window(attention: Any) -> int | None:
    return attention.sliding_window


def _scores(model: Any, x: Float[Tensor, "n d"], runs: Runs) -> Float[Tensor, "n classes"]:
    return linear(model.score, x, runs)


def _classes(model: Any, x: Float[Tensor, "n d"], runs: Runs) -> Float[Tensor, "n classes"]:
    return linear(model.classifier, x, runs)


def _words(model: Any, x: Float[Tensor, "n d"], runs: Runs) -> Float[Tensor, "n words"]:
    return linear(model.lm_head, x, runs)


TURNS_WITH_LENGTH = {
    "turns positions by the length of what it sees": lambda config: (
        (config.rope_parameters or {}).get("rope_type", "default") in ("dynamic", "longrope")
    )
}


def _llama(window: Callable[[Any], int | None], **refuses: Callable[[Any], bool]) -> Architecture:
    def windows(backbone: Any) -> frozenset[int | None]:
        return frozenset(window(layer.self_attn) for layer in backbone.layers)

    return Architecture(
        layers=lambda backbone: backbone.layers,
        embed=lambda backbone, at: backbone.embed_tokens(at.flat(at.ids)),
        layer=llama_layer(window),
        shape=_shape(windows),
        heads={
            "ForSequenceClassification": Head("last", _scores),
            "ForTokenClassification": Head("all", _scores),
            "ForCausalLM": Head("all", _words),
        },
        finish=lambda backbone, x: backbone.norm(x),
        shared=_rotary,
        refuses=TURNS_WITH_LENGTH | refuses,
    )


def _gpt2_embed(backbone: Any, at: Pass) -> Float[Tensor, "real_tokens d"]:
    x = backbone.wte(at.flat(at.ids)) + backbone.wpe(at.positions[: len(at.positions) - at.fill])
    return x if at.types is None else x + backbone.wte(at.flat(at.types))


LLAMA = _llama(_no_window)
MISTRAL = _llama(_configs_window)
QWEN = _llama(_own_window)
GEMMA = _llama(
    _no_window,
    **{"looks both ways": lambda config: bool(getattr(config, "use_bidirectional_attention", False))},
)
GPT_NEOX = Architecture(
    layers=lambda backbone: backbone.layers,
    embed=lambda backbone, at: backbone.embed_in(at.flat(at.ids)),
    layer=gpt_neox_layer,
    shape=_shape(lambda backbone: frozenset({None})),
    heads={
        "ForSequenceClassification": Head("last", _scores),
        "ForTokenClassification": Head("all", _classes),
        "ForCausalLM": Head("all", _words),
    },
    finish=lambda backbone, x: backbone.final_layer_norm(x),
    shared=_rotary,
    refuses=TURNS_WITH_LENGTH,
)
GPT2 = Architecture(
    layers=lambda backbone: backbone.h,
    embed=_gpt2_embed,
    layer=gpt2_layer,
    shape=_shape(lambda backbone: frozenset({None})),
    heads={
        "ForSequenceClassification": Head("last", _scores),
        "ForTokenClassification": Head("all", _classes),
        "LMHeadModel": Head("all", _words),
    },
    finish=lambda backbone, x: backbone.ln_f(x),
    refuses={"attends to another model": lambda config: config.add_cross_attention},
)
