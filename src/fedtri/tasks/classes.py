"""Shared by tasks that predict a class: loss and hits, loading a classifier, and the likeliest class."""

import re
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoModel, PretrainedConfig

from fedtri.models.loading import Weights, head_layers
from fedtri.tasks import checkpoints
from fedtri.tasks.base import Scores

NAMELESS = re.compile(r"(LABEL_)?-?\d+")
"""Names of classes that nobody named: those that transformers makes up, and numbers."""


def classified(logits: Float[Tensor, "batch classes"], labels: Int[Tensor, "batch"]) -> Scores:
    """Of each sample, the cross-entropy, and 1 if the largest score is the label's, else 0."""
    loss = cross_entropy(logits, labels, reduction="none")
    return Scores(loss, (logits.detach().argmax(-1) == labels).to(loss.dtype))


def likeliest(logits: Float[Tensor, "batch classes"], label_names: Sequence[str]) -> list[str]:
    """The likeliest class of each sample and its probability."""
    return [f"{label_names[int(row.argmax())]} {float(row.max()):.2f}" for row in torch.softmax(logits.cpu(), -1)]


def load_classifier(
    auto: Any, model: str, what: str, weights: Weights, label_names: Sequence[str]
) -> tuple[nn.Module, frozenset[str]]:
    """A classifier of these classes, and the names of the parameters that its checkpoint did not have.

    The checkpoint's head is kept if it has the same classes in the same order (upper and lower case are equal). It is
    also kept if it has the same number of classes and one side gives no names. Else its last layer counts as fresh.
    """
    names = dict(enumerate(label_names))
    own = list((checkpoints.load_config(model, what).id2label or {}).values())
    loaded, fresh = checkpoints.load_model(
        auto, model, what, weights, head_layers, num_labels=len(names), id2label=names,
        label2id={v: k for k, v in names.items()}, ignore_mismatched_sizes=True,
    )  # fmt: skip
    if not same_classes(own, label_names):
        layers = head_layers(loaded)
        last = layers[-1:]  # the layers before it do not depend on the classes
        fresh |= {name for name, _ in loaded.named_parameters() if name.rpartition(".")[0] in last}
    return loaded, fresh


def skeleton(auto: Any, shape: PretrainedConfig) -> nn.Module:
    """The classifier that the class `auto` makes, or the bare model if the architecture has no classifier."""
    return (auto if type(shape) in auto._model_mapping else AutoModel).from_config(shape)


def same_classes(own: Sequence[str], label_names: Sequence[str]) -> bool:
    """Whether two lists of classes are the same: by name if both have names, else by their number."""
    if any(all(NAMELESS.fullmatch(str(name)) for name in names) for names in (own, label_names)):
        return len(own) == len(label_names)
    return [name.casefold() for name in own] == [name.casefold() for name in label_names]
