"""The shapes of a federation's tensors, from the model's configuration alone: no weights are loaded."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig

from fedtri.adapters.layer import shape_of
from fedtri.adapters.layout import Layer, Layout
from fedtri.errors import FedtriError
from fedtri.method import Method
from fedtri.models.loading import find_targets, locate
from fedtri.tasks import Recipe


def skeleton(model: str, recipe: Recipe, labels: int | None = None) -> nn.Module:
    """The task's model on the meta device: shapes without numbers.

    Args:
        model: A model folder, a config.json, or a name as in a configuration.
        recipe: The task.
        labels: How many classes its head has; None: as the model's configuration says.

    Raises:
        FedtriError: Where the model has no configuration.
    """
    path = Path(model).expanduser()
    try:
        shape = AutoConfig.from_pretrained(str(path) if path.is_file() else locate(model))
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise FedtriError(
            f"model: {model} has no configuration that can be read: {reason}; expected a folder or hub name"
        ) from None
    if labels is not None:
        shape.num_labels = labels
    with torch.device("meta"):
        return recipe.skeleton(shape)


def layout_of(
    model: nn.Module, recipe: Recipe, method: Method, rank: int, targets: str | Sequence[str], layers: str = "all",
    *, kind: str = "lora",
) -> Layout:  # fmt: skip
    """Which tensors a client has of this model, and their shapes.

    Args:
        model: The plain model, or its skeleton.
        recipe: The task, which says what the head is.
        method: The method, which says what the adapter consists of.
        rank: The largest rank of a client.
        targets: The layers to adapt, as in a configuration.
        layers: "all", or "last:K" for the targets in the last K layers of the backbone.
        kind: lora, dora or hira.

    Raises:
        FedtriError: For targets that the model has not, or a rank that does not fit.
    """
    parts, head = method.adapter, recipe.head(model)
    in_head = tuple(
        (f"{name}.{part}", tuple(value.shape)) for name in head
        for part, value in model.get_submodule(name).named_parameters(recurse=False)
    )  # fmt: skip
    if "P" in parts.extra:
        shapes = [(name, tuple(value.shape)) for name, value in model.named_parameters()]
        backbone = [item for item in shapes if not item[0].startswith(tuple(f"{name}." for name in head))]
        return Layout((), in_head, tuple(backbone), parts.extra.replace("P", ""))
    if rank % parts.heads:
        raise FedtriError(f"rank: expected a multiple of method_options.heads ({parts.heads}), got {rank}")
    adapted = []
    for name in find_targets(model, targets, layers):
        d_out, d_in = shape_of(model.get_submodule(name))
        if rank > min(d_out, d_in):
            raise FedtriError(
                f"rank: {rank} is larger than layer {name} ({d_out} x {d_in}); use at most {min(d_out, d_in)}"
            )
        adapted.append(Layer(name, d_in, d_out))
    magnitudes = "M" if kind == "dora" else ""
    return Layout(tuple(adapted), in_head, extra=_in_order(parts.extra + magnitudes), heads=parts.heads)


def _in_order(extra: str) -> str:
    """The extra factors in the order in which a layout names them."""
    return "".join(factor for factor in "SMWab" if factor in extra)
