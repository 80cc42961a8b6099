"""BERT and its kin, written out: embeddings, layers of attention and feed-forward part, heads.

h = norm(x + output(attention(query(x), key(x), value(x))))
y = norm(h + output(activation(intermediate(h))))
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fedtri.execution.fast.architecture import Architecture, Head
from fedtri.execution.fast.attention import attend
from fedtri.execution.fast.linear import Runs
from fedtri.execution.fast.linear import apply as linear
from fedtri.execution.fast.passes import Pass, Shape, View


def bert_layer(layer: Any, x: Float[Tensor, "n d"], view: View, _: None) -> Float[Tensor, "m d"]:
    """A layer of BERT, RoBERTa and ELECTRA."""
    own, kept = layer.attention.self, view.kept(x)
    found = attend(
        linear(own.query, kept, view.leaving), linear(own.key, x, view.entering), linear(own.value, x, view.entering),
        view.attending, own.scaling,
    )  # fmt: skip
    h = layer.attention.output.LayerNorm(linear(layer.attention.output.dense, found, view.leaving) + kept)
    return _feed_forward(layer, h, view.leaving)


def mpnet_layer(layer: Any, x: Float[Tensor, "n d"], view: View, _: None) -> Float[Tensor, "m d"]:
    """A layer of MPNet; its bias by distance is in the view's masks."""
    own, kept = layer.attention.attn, view.kept(x)
    found = attend(
        linear(own.q, kept, view.leaving), linear(own.k, x, view.entering), linear(own.v, x, view.entering),
        view.attending, own.attention_head_size**-0.5,
    )  # fmt: skip
    h = layer.attention.LayerNorm(linear(own.o, found, view.leaving) + kept)
    return _feed_forward(layer, h, view.leaving)


def _feed_forward(layer: Any, h: Float[Tensor, "n d"], runs: Runs) -> Float[Tensor, "n d"]:
    inner = layer.intermediate.intermediate_act_fn(linear(layer.intermediate.dense, h, runs))
    return layer.output.LayerNorm(linear(layer.output.dense, inner, runs) + h)


def distilbert_layer(layer: Any, x: Float[Tensor, "n d"], view: View, _: None) -> Float[Tensor, "m d"]:
    """A layer of DistilBERT."""
    own, kept = layer.attention, view.kept(x)
    found = attend(
        linear(own.q_lin, kept, view.leaving), linear(own.k_lin, x, view.entering), linear(own.v_lin, x, view.entering),
        view.attending, own.scaling,
    )  # fmt: skip
    h = layer.sa_layer_norm(linear(own.out_lin, found, view.leaving) + kept)
    inner = layer.ffn.activation(linear(layer.ffn.lin1, h, view.leaving))
    return layer.output_layer_norm(linear(layer.ffn.lin2, inner, view.leaving) + h)


def _embed(
    positions: Callable[[Any, Pass], Int[Tensor, "real_tokens"]],
) -> Callable[[Any, Pass], Float[Tensor, "real_tokens d"]]:
    """Words, kinds of token where the model knows any, and positions."""

    def embed(backbone: Any, at: Pass) -> Float[Tensor, "real_tokens d"]:
        own, ids = backbone.embeddings, at.flat(at.ids)
        x = own.word_embeddings(ids)
        if hasattr(own, "token_type_embeddings"):
            types = torch.zeros_like(ids) if at.types is None else at.flat(at.types)
            x = x + own.token_type_embeddings(types)
        x = own.LayerNorm(x + own.position_embeddings(positions(own, at)))
        return linear(backbone.embeddings_project, x, at.inner.entering) if _projects(backbone) else x

    return embed


def _projects(backbone: Any) -> bool:
    return hasattr(backbone, "embeddings_project")


def _from_zero(embeddings: Any, at: Pass) -> Int[Tensor, "real_tokens"]:
    return at.positions[: len(at.positions) - at.fill]


def _behind_padding(embeddings: Any, at: Pass) -> Int[Tensor, "real_tokens"]:
    """RoBERTa's positions: they count from behind the padding token's number, and only tokens that are not it."""
    counted = at.ids != embeddings.padding_idx
    return at.flat(counted.cumsum(1) * counted + embeddings.padding_idx)


def _shape(backbone: Any) -> Shape:
    config = backbone.config
    return Shape(heads=config.num_attention_heads, dtype=backbone.embeddings.word_embeddings.weight.dtype)


def _mpnet_shape(backbone: Any) -> Shape:
    encoder = backbone.encoder

    def bias(back: Int[Tensor, "rows queries keys"]) -> Float[Tensor, "rows heads queries keys"]:
        return encoder.relative_attention_bias(encoder.relative_position_bucket(-back)).permute(0, 3, 1, 2)

    plain = _shape(backbone)
    return Shape(heads=plain.heads, dtype=plain.dtype, bias=bias)


def _bert_classifier(model: Any, x: Float[Tensor, "n d"], runs: Runs) -> Float[Tensor, "n classes"]:
    pooler = model.bert.pooler
    return linear(model.classifier, pooler.activation(linear(pooler.dense, x, runs)), runs)


def _dense_classifier(activation: Callable[[Tensor], Tensor]) -> Callable[[Any, Tensor, Runs], Tensor]:
    def classify(model: Any, x: Float[Tensor, "n d"], runs: Runs) -> Float[Tensor, "n classes"]:
        head = model.classifier
        return linear(head.out_proj, activation(linear(head.dense, x, runs)), runs)

    return classify


def _distilbert_classifier(model: Any, x: Float[Tensor, "n d"], runs: Runs) -> Float[Tensor, "n classes"]:
    return linear(model.classifier, torch.relu(linear(model.pre_classifier, x, runs)), runs)


def _tagger(model: Any, x: Float[Tensor, "n d"], runs: Runs) -> Float[Tensor, "n tags"]:
    return linear(model.classifier, x, runs)


def _heads(classifier: Callable[[Any, Tensor, Runs], Tensor]) -> dict[str, Head]:
    return {"ForSequenceClassification": Head("first", classifier), "ForTokenClassification": Head("all", _tagger)}


DECODING = {"is set up as a decoder": lambda config: config.is_decoder or config.add_cross_attention}

BERT = Architecture(
    layers=lambda backbone: backbone.encoder.layer,
    embed=_embed(_from_zero),
    layer=bert_layer,
    shape=_shape,
    heads=_heads(_bert_classifier),
    refuses=DECODING,
)
ROBERTA = Architecture(
    layers=lambda backbone: backbone.encoder.layer,
    embed=_embed(_behind_padding),
    layer=bert_layer,
    shape=_shape,
    heads=_heads(_dense_classifier(torch.tanh)),
    refuses=DECODING,
)
ELECTRA = Architecture(
    layers=lambda backbone: backbone.encoder.layer,
    embed=_embed(_from_zero),
    layer=bert_layer,
    shape=_shape,
    heads=_heads(_dense_classifier(torch.nn.functional.gelu)),
    refuses=DECODING,
)
MPNET = Architecture(
    layers=lambda backbone: backbone.encoder.layer,
    embed=_embed(_behind_padding),
    layer=mpnet_layer,
    shape=_mpnet_shape,
    heads=_heads(_dense_classifier(torch.tanh)),
)
DISTILBERT = Architecture(
    layers=lambda backbone: backbone.transformer.layer,
    embed=_embed(_from_zero),
    layer=distilbert_layer,
    shape=_shape,
    heads=_heads(_distilbert_classifier),
)
