"""What a task must offer so that every method, the training loop and the sketch can stay ignorant of it.

A `Recipe` says how a kind of task is made: from a source's columns to a pool, from a checkpoint to a model, from a
pool to examples. A `LearningTask` scores batches of these examples. Whose adapter a model carries is no task's business.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PretrainedConfig

from fedtri.data.pool import Pool, Source
from fedtri.models.loading import Weights, head_layers

Batch = Mapping[str, Tensor]
Rows = Int[np.ndarray, "_"]
Model = Any
"""A Hugging Face model with one client's adapter, or what stands for one in a pass that several clients share: called
with a batch's inputs it gives `.logits`, its `base_model` gives `.last_hidden_state`."""


@dataclass(frozen=True)
class Scores:
    """What a model makes of a batch, summed over each sample's own terms (one for a class, one a token for text)."""

    loss: Float[Tensor, "batch"]
    correct: Float[Tensor, "batch"]


@runtime_checkable
class Examples(Protocol):
    """A pool turned into model inputs, once."""

    @property
    def lengths(self) -> Int[np.ndarray, "n"]:
        """Tokens of each example: what sorting and the token budget go by."""
        ...

    @property
    def terms(self) -> Int[np.ndarray, "n"]:
        """Loss terms of each example: a client's loss is the mean over all terms of its minibatch."""
        ...

    @property
    def labels(self) -> Int[np.ndarray, "n"] | None:
        """The class of each example, for sketches; None where there are none."""
        ...

    def batch(self, rows: Rows) -> Batch:
        """These examples, padded to the longest among them; tensors of any shape whose first dimension is the batch's
        or a multiple of it, sample by sample."""
        ...


@runtime_checkable
class LearningTask(Protocol):
    """How one kind of task scores a batch and which features stand for an example."""

    @property
    def classes(self) -> int:
        """How many classes a sketch has; 1 where examples have no class."""
        ...

    def feature_size(self, model: nn.Module) -> int:
        """d of `features`: what a sketch's mixtures live in."""
        ...

    def scores(self, model: Model, batch: Batch) -> Scores:
        """Loss and hits of each sample."""
        ...

    def features(self, model: Model, batch: Batch) -> Float[Tensor, "batch d"]:
        """One vector a sample, from the backbone."""
        ...

    def more_metrics(
        self, model: nn.Module, examples: Examples, rows: Rows, found: Mapping[str, float]
    ) -> Mapping[str, float]:
        """Metrics of these rows beyond loss and accuracy (`found`); {} where there are none.

        The model carries the client's adapter, and can generate where its architecture does.

        Any name may be given but "train_loss" and "validation_loss"; it stands under "metrics" in rounds.jsonl.
        """
        ...


def inputs_of(batch: Batch) -> dict[str, Tensor]:
    """What of a batch goes into the model: all but the labels."""
    return {name: value for name, value in batch.items() if name != "labels"}


def to_device(batch: Batch, device: torch.device) -> dict[str, Tensor]:
    """The batch on this device."""
    return {name: value.to(device) for name, value in batch.items()}


@dataclass(frozen=True)
class Loaded:
    """A checkpoint: the model, what turns examples into its inputs, and which of its parameters were not in it."""

    model: nn.Module
    processor: Any
    fresh: frozenset[str] = frozenset()


Answers = Callable[[Any, Any, Sequence[str], Sequence[str], int], list[str]]


@dataclass(frozen=True)
class Recipe:
    """How a kind of task is made; what `TASKS` holds are functions that return one, given the task's options."""

    name: str
    peft_type: str | None
    """PEFT's own name of the task, for adapter_config.json; None where it has none."""
    roles: tuple[str, ...]
    """The roles of `data.pool.ROLES` that [columns] may give."""
    pool: Callable[[Source], Pool]
    """Every column checked, every mistake a FedtriError in one line."""
    load: Callable[[str, Sequence[str], Weights], Loaded]
    """(model setting, class names, how weights are kept) to the model; FedtriError in one line where it cannot be."""
    examples: Callable[[Pool, Any, int], Examples]
    """(pool, processor, max_length) to model inputs."""
    learning: Callable[[Sequence[str], Any], LearningTask]
    """(class names, processor) to how batches are scored."""
    skeleton: Callable[[PretrainedConfig], nn.Module]
    """The model of a configuration without weights; called under torch.device("meta")."""
    head: Callable[[nn.Module], list[str]] = head_layers
    """The names of the linear layers that are the task's head, one copy a client; [] where the model is whole."""
    classifies: bool = False
    """Whether a class is predicted, so that guessing the largest one is a yardstick."""
    kept: type[Any] | None = None
    """The class of its examples where that is a dataclass of arrays, which a site keeps on its disk."""
    answers: Answers | None = None
    """(model with the client's adapter, processor, class names, inputs, max_length) to an answer each."""
