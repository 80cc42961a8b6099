"""Which architectures are fast, by `config.model_type`; tests hold each to transformers' own forward pass."""

from typing import Any

from torch import nn

from fedtri.adapters.model import AdaptedModel
from fedtri.execution.fast import decoders, encoders
from fedtri.execution.fast.architecture import Architecture, Head

ARCHITECTURES: dict[str, Architecture] = {
    "bert": encoders.BERT,
    "roberta": encoders.ROBERTA,
    "xlm-roberta": encoders.ROBERTA,
    "electra": encoders.ELECTRA,
    "mpnet": encoders.MPNET,
    "distilbert": encoders.DISTILBERT,
    "llama": decoders.LLAMA,
    "mistral": decoders.MISTRAL,
    "qwen2": decoders.QWEN,
    "qwen3": decoders.QWEN,
    "gemma": decoders.GEMMA,
    "gpt2": decoders.GPT2,
    "gpt_neox": decoders.GPT_NEOX,
}


def why_not(adapted: AdaptedModel) -> str | None:
    """Why a model's clients cannot go through the fast forward pass; None where they can."""
    model: Any = adapted.model
    config = getattr(model, "config", None)
    kind = getattr(config, "model_type", None)
    if kind not in ARCHITECTURES:
        return f"model type {kind!r} is not in the table of fast architectures"
    if not type(model).__module__.startswith(f"transformers.models.{kind.replace('-', '_')}."):
        return f"{type(model).__name__} is not transformers' own"
    if head_of(model) is None:
        return f"{type(model).__name__}'s head is not in the table of fast architectures"
    if adapted.quantised:
        return "its weights are quantised"
    if chunk := getattr(config, "attention_chunk_size", None):
        return f"its attention looks at chunks of {chunk} tokens"
    for reason, told in ARCHITECTURES[kind].refuses.items():
        if told(config):
            return f"it {reason}"
    return None


def architecture_of(model: Any) -> Architecture:
    """The written-out forward pass of a model that is in the table."""
    return ARCHITECTURES[model.config.model_type]


def head_of(model: nn.Module) -> Head | None:
    """What stands on the last layer of a model that is in the table; None where that is not written out."""
    name = type(model).__name__
    found = [head for suffix, head in architecture_of(model).heads.items() if name.endswith(suffix)]
    return found[0] if found else None
