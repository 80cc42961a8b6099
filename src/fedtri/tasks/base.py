"""What a task must offer so that every method, the training loop and the sketch can stay ignorant of it.

A `Recipe` says how a kind of task is made: from a source's columns to a pool, from a checkpoint to a model, from a
pool to examples. A `LearningTask` scores batches of these examples. No task knows whose adapter a model carries.
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
    """Loss and number of hits of each sample, summed over its terms: one for a class, one for each token of a text."""

    loss: Float[Tensor, "batch"]
    correct: Float[Tensor, "batch"]


@runtime_checkable
class Examples(Protocol):
    """A pool as model inputs. It is converted only once."""

    @property
    def lengths(self) -> Int[np.ndarray, "n"]:
        """The number of tokens of each example, for sorting and for the token budget."""
        ...

    @property
    def terms(self) -> Int[np.ndarray, "n"]:
        """The number of loss terms of each example. A client's loss is the mean over all terms of its minibatch."""
        ...

    @property
    def labels(self) -> Int[np.ndarray, "n"] | None:
        """The class of each example, for sketches; None if examples have none."""
        ...

    def batch(self, rows: Rows) -> Batch:
        """These examples, padded to the longest of them.

        The first dimension of each tensor is the batch size, or a multiple of it in the order of the samples.
        """
        ...


@runtime_checkable
class LearningTask(Protocol):
    """How a task scores a batch, and which features describe an example."""

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


@runtime_checkable
class Classifying(Protocol):
    """A task whose model ends in a linear layer with a row for each class."""

    def logits_and_classes(
        self, model: Model, batch: Batch
    ) -> tuple[Float[Tensor, "terms outputs"], Int[Tensor, "terms"]]:
        """What that layer gives for each loss term, and the term's class; in the order of the samples."""
        ...


def inputs_of(batch: Batch) -> dict[str, Tensor]:
    """The part of a batch that goes into the model: everything but the labels."""
    return {name: value for name, value in batch.items() if name != "labels"}


def to_device(batch: Batch, device: torch.device) -> dict[str, Tensor]:
    """The batch on this device."""
    return {name: value.to(device) for name, value in batch.items()}


@dataclass(frozen=True)
class Loaded:
    """A loaded checkpoint: the model, the tokenizer or processor, and the names of parameters that it lacked."""

    model: nn.Module
    processor: Any
    fresh: frozenset[str] = frozenset()


Answers = Callable[[Any, Any, Sequence[str], Sequence[str], int], list[str]]


def hidden_size(model: nn.Module) -> int:
    """The backbone's hidden size, as the model's configuration says."""
    return model.config.hidden_size  # pyright: ignore[reportAttributeAccessIssue, reportReturnType]


@dataclass(frozen=True)
class Recipe:
    """How a task is made. `TASKS` holds functions from a task's options to a Recipe."""

    name: str
    peft_type: str | None
    """PEFT's name of the task, for adapter_config.json; None if PEFT has none."""
    roles: tuple[str, ...]
    """The roles of `data.pool.ROLES` that [columns] may give."""
    pool: Callable[[Source], Pool]
    """(source) to a pool. Checks every column; a mistake is a FedtriError in one line."""
    load: Callable[[str, Sequence[str], Weights], Loaded]
    """(model setting, class names, how weights are stored) to the model. Raises FedtriError if it cannot be loaded."""
    examples: Callable[[Pool, Any, int], Examples]
    """(pool, processor, max_length) to model inputs."""
    learning: Callable[[Sequence[str], Any], LearningTask]
    """(class names, processor) to the LearningTask that scores batches."""
    skeleton: Callable[[PretrainedConfig], nn.Module]
    """(model configuration) to the model without weights. It is called under torch.device("meta")."""
    head: Callable[[nn.Module], list[str]] = head_layers
    """(model) to the names of the linear layers of the head, of which each client has a copy; [] without a head."""
    feature_size: Callable[[nn.Module], int] = hidden_size
    """(model, or its skeleton) to d, the dimension of `LearningTask.features`."""
    sketch_classes: Callable[[Sequence[str]], int] = lambda label_names: max(1, len(label_names))
    """(class names) to the number of classes of a sketch; 1 if examples have no class."""
    classifies: bool = False
    """Whether a class is predicted. If so, reports compare with guessing the largest class."""
    kept: type[Any] | None = None
    """The class of its examples if that is a dataclass of arrays; a site then keeps them on its disk."""
    answers: Answers | None = None
    """(model with the client's adapter, processor, class names, inputs, max_length) to an answer each."""
    example_input: str = "some text"
    """What an input may look like: what the command line proposes to ask after a run."""
