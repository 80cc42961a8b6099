"""Reads and writes ordinary PEFT adapters. B·C is written as B, so every tool that reads LoRA can serve the result."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from fedtri import atomic
from fedtri.adapters.bfloat16 import Bfloat16Linear
from fedtri.adapters.factors import core_of, effective_update
from fedtri.adapters.layer import AdaptedLinear, Kind, weight_of
from fedtri.adapters.layout import Factors, Key, Layout
from fedtri.adapters.model import AdaptedModel
from fedtri.errors import FedtriError
from fedtri.models.loading import Conv1D

if TYPE_CHECKING:
    from peft import PeftConfig

PREFIX = "base_model.model."
LINEAR = (nn.Linear, Conv1D, AdaptedLinear, Bfloat16Linear)


def write_peft(
    folder: Path,
    factors: Factors,
    adapted: AdaptedModel,
    *,
    alpha: float,
    base_model: str,
    task_type: str | None,
    labels: Sequence[str] | None = None,
) -> None:
    """Write adapter_config.json and adapter_model.safetensors of a LoRA with B·C as lora_B, of DoRA, or of HiRA.

    Two adapters of a layer become one of twice the rank. `labels` are the classes of a head that has its own; they are
    written beside the adapter as labels.json.

    The folder is made whole or not at all; one that exists is not touched (FedtriError). Raises FedtriError too where
    PEFT has no format for what the client has: see `unexportable`.
    """
    layout = adapted.layout
    if reason := unexportable(layout):
        raise FedtriError(f"{reason}; write the whole model with --merge")
    if folder.exists() and any(folder.iterdir()):
        raise FedtriError(f"{folder}: exists already and is not empty; choose another folder")
    rank = next(value.shape[0] for key, value in factors.items() if key.factor == "A")
    times = 2 if "a" in layout.extra else 1  # two adapters are one of twice the rank
    tensors: dict[str, Tensor] = {}
    for layer in layout.layers:
        A, B = (factors[Key(layer.name, f)] for f in "AB")
        BC, at = B @ core_of(factors, layer.name), f"{PREFIX}{layer.name}"
        if times == 2:
            A, BC = torch.cat([A, factors[Key(layer.name, "a")]]), torch.cat([BC, factors[Key(layer.name, "b")]], 1)
        if adapted.kind == "hira":  # PEFT's HiRA has no alpha, and keeps bare parameters
            tensors |= {f"{at}.hira_A": A.contiguous(), f"{at}.hira_B": (BC * (alpha / rank)).contiguous()}
            continue
        tensors |= {f"{at}.lora_A.weight": A.contiguous(), f"{at}.lora_B.weight": BC.contiguous()}
        if adapted.kind == "dora":
            tensors[f"{at}.lora_magnitude_vector"] = factors[Key(layer.name, "M")].contiguous()
    for name, _ in layout.head:
        tensors[f"{PREFIX}{name}"] = factors[Key(name, "H")].contiguous()
    config = _peft_config(
        adapted,
        alpha * times,
        r=rank * times,
        target_modules=_target_modules(adapted),
        modules_to_save=sorted({name.split(".")[0] for name, _ in layout.head}) or None,
        fan_in_fan_out=isinstance(adapted.layer(layout.layers[0].name).base, Conv1D),
        task_type=task_type,
        base_model_name_or_path=base_model,
        inference_mode=True,
    )
    with atomic.folder(folder) as part:
        config.save_pretrained(str(part))
        safetensors.torch.save_file(tensors, part / "adapter_model.safetensors", metadata={"format": "pt"})
        if labels is not None:
            atomic.write_json(part / "labels.json", list(labels))


def unexportable(layout: Layout) -> str | None:
    """Why PEFT has no format for a client's tensors; None if it has one."""
    if layout.backbone:
        return "export: the whole model was trained, there is no adapter"
    if "W" in layout.extra:
        return "export: this method adds a dense update to the weights, which no adapter of low rank can hold"
    return None


def _peft_config(adapted: AdaptedModel, alpha: float, **common: Any) -> "PeftConfig":
    if adapted.kind == "hira":
        try:
            from peft import HiraConfig
        except ImportError:
            raise FedtriError("export: HiRA needs peft 0.20 or newer; or write the whole model with --merge") from None
        return HiraConfig(**common)
    from peft import LoraConfig

    whole = int(alpha) if alpha == int(alpha) else alpha
    return LoraConfig(lora_alpha=whole, use_dora=adapted.kind == "dora", **common)  # pyright: ignore[reportArgumentType]


def read_peft(folder: str | Path, layout: Layout, rank: int, alpha: float) -> dict[Key, Tensor]:
    """A and B of an existing PEFT LoRA adapter. B is rescaled, so that ΔW is the same with this run's alpha.

    Args:
        folder: The folder that PEFT wrote.
        layout: The layers of this run.
        rank: This run's rank; the adapter's must be equal.
        alpha: This run's alpha.

    Raises:
        FedtriError: If the folder holds no plain LoRA adapter, has another rank, or lacks one of the layers.
    """
    folder = Path(folder)
    try:
        config = json.loads((folder / "adapter_config.json").read_text())
        tensors = safetensors.torch.load_file(folder / "adapter_model.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise FedtriError(f"init_adapter: {folder} is not a PEFT adapter folder with safetensors: {error}") from None
    if config.get("peft_type") != "LORA" or config.get("use_dora") or config.get("r") != rank:
        raise FedtriError(
            f"init_adapter: {folder}: expected plain LoRA of rank {rank}, got {config.get('peft_type')} "
            f"of rank {config.get('r')}; set rank to the adapter's"
        )
    scale = config["lora_alpha"] / (rank**0.5 if config.get("use_rslora") else rank)
    found: dict[Key, Tensor] = {}
    for layer in layout.layers:
        names = [f"{PREFIX}{layer.name}.lora_{f}.weight" for f in "AB"]
        if missing := [name for name in names if name not in tensors]:
            raise FedtriError(f"init_adapter: {folder} has no {missing[0]}; choose targets that the adapter has")
        A, B = (tensors[name].float() for name in names)
        if A.shape != (rank, layer.d_in) or B.shape != (layer.d_out, rank):
            raise FedtriError(
                f"init_adapter: {folder}: {layer.name} has shapes {tuple(A.shape)}, {tuple(B.shape)}; another model?"
            )
        found |= {Key(layer.name, "A"): A, Key(layer.name, "B"): B * (scale / (alpha / rank))}
    return found


def merge(
    model: nn.Module, factors: Mapping[Key, Tensor], layout: Layout, scale: float, kind: Kind = "lora"
) -> nn.Module:
    """Write a client's update and head into the plain model's own weights. Changes `model` and returns it."""
    with torch.no_grad():
        for layer in layout.layers:
            base = model.get_submodule(layer.name)
            weight, update = weight_of(base), effective_update(factors, layer.name, scale)
            tuned = weight + (weight * update if kind == "hira" else update).to(weight)
            if (W := factors.get(Key(layer.name, "W"))) is not None:
                tuned = tuned + W.to(weight)
            if kind == "dora":
                M = factors[Key(layer.name, "M")].to(weight)
                tuned = tuned * (M / torch.linalg.vector_norm(tuned, dim=1))[:, None]
            weight.copy_(tuned)
        for key in layout.keys(frozenset("PH")):
            model.get_parameter(key.layer).copy_(factors[key])
    return model


def _target_modules(adapted: AdaptedModel) -> list[str]:
    """The last parts of the layers' names, as serving engines expect; whole names where these match more layers."""
    names = {layer.name for layer in adapted.layout.layers}
    suffixes = {name.rsplit(".", 1)[-1] for name in names}
    matched = {
        name for name, module in adapted.model.named_modules()
        if name.rsplit(".", 1)[-1] in suffixes and isinstance(module, LINEAR)
    }  # fmt: skip
    return sorted(suffixes if matched == names else names)
