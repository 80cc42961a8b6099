"""What a learning task must offer so that every method, the training loop and the sketch can stay ignorant of it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Int
from torch import Tensor, nn

Batch = Mapping[str, Tensor]


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

    def batch(self, rows: Int[np.ndarray, "batch"]) -> Batch:
        """These examples, padded to the longest among them."""
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

    def scores(self, model: nn.Module, batch: Batch) -> Scores:
        """Loss and hits of each sample."""
        ...

    def features(self, model: nn.Module, batch: Batch) -> Float[Tensor, "batch d"]:
        """One vector a sample, from the backbone."""
        ...
