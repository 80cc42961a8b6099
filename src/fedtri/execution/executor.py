"""What an executor is: it trains and scores clients, each with its own adapter on one frozen model.

`reference.py` defines what that means, one client at a time; every other executor must agree with it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from fedtri.adapters.layout import Factors, Layout
from fedtri.method import Trained

Rows = Int[np.ndarray, "_"]
OnStep = Callable[[str, int, float], None]
"""(client, step counted from 1, loss of its minibatch)"""
Reduce = Callable[[Mapping[str, Tensor]], Factors]
"""(the dense gradient (d_out, d_in) of each adapted layer, by its name) to what is kept of it."""


@dataclass(frozen=True)
class Optimization:
    """How a client trains in one round: exactly one of steps and epochs; the schedule spans the round."""

    steps: int | None = 10
    epochs: float | None = None
    batch_size: int = 16
    learning_rate: float = 1e-3
    schedule: str = "constant"
    warmup: int = 0
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    clip: float | None = 1.0
    """The largest norm of a client's gradient over all that learns; None: any."""
    learning_rates: Mapping[str, float] = field(default_factory=dict)
    """The learning rate of a factor, by its letter, where it is not `learning_rate`. The schedule scales all alike."""


@dataclass(frozen=True)
class ClientModel:
    """One client's model: its own tensors, and what makes them mean something."""

    client: str
    factors: Factors
    """All of its tensors, at its own rank, on the CPU."""
    rank: int
    alpha: float
    """The scale of its update is alpha / rank."""
    classes: Int[np.ndarray, "own"] | None = None
    """The classes that it has a head for, ascending; its head's tensors have these rows alone. None: all."""


@dataclass(frozen=True)
class Training:
    """One client's share of a training phase."""

    model: ClientModel
    rows: Rows
    """Its training examples."""
    seed: int
    """From which its minibatches are drawn."""
    proximal: float = 0.0
    """μ of μ/2 ‖θ − towards‖², over the factors that learn."""
    towards: Factors | None = None
    """What the proximal term pulls to; None: the tensors it starts with."""


@dataclass(frozen=True)
class Scoring:
    """One client's share of an evaluation phase."""

    model: ClientModel
    rows: Rows
    """The examples it is scored on; at least one."""
    further: bool = True
    """Whether the task's further metrics (perplexity, exact match) are wanted beside loss and accuracy."""


@dataclass(frozen=True)
class HeadInputs:
    """What enters the last layer of a client's head, and the class that it should give; a row for each loss term."""

    inputs: Float[np.ndarray, "terms d"]
    classes: Int[np.ndarray, "terms"]

    @staticmethod
    def of(parts: Sequence[tuple[Rows, Tensor, Tensor]]) -> "HeadInputs":
        """From parts of (the example that each term belongs to, inputs, classes), in the order of the examples."""
        owners, inputs, classes = zip(*parts, strict=True)
        order = np.argsort(np.concatenate(owners), kind="stable")
        return HeadInputs(torch.cat(inputs).cpu().numpy()[order], torch.cat(classes).cpu().numpy()[order])


@runtime_checkable
class Executor(Protocol):
    """Trains and scores the clients of one place on one model, task and set of examples."""

    @property
    def layout(self) -> Layout:
        """The tensors that a client of this model has."""
        ...

    def describe(self) -> str:
        """One line for the log and summary.json: which executor this is, and why no faster one."""
        ...

    def train(
        self,
        work: Sequence[Training],
        learns: frozenset[str],
        how: Optimization,
        on_step: OnStep = lambda client, step, loss: None,
    ) -> list[Trained]:
        """Each client's tensors and mean training loss after one round; in the order of `work`."""
        ...

    def evaluate(self, work: Sequence[Scoring]) -> list[dict[str, float]]:
        """Each client's mean loss and accuracy over its rows, and further metrics; in the order of `work`."""
        ...

    def features(self, rows: Sequence[Rows]) -> list[Float[np.ndarray, "rows d"]]:
        """The frozen, un-adapted backbone's feature of each row; float32, one array for each element of `rows`."""
        ...

    def head_inputs(self, work: Sequence[Scoring]) -> list[HeadInputs]:
        """What enters the last layer of each client's head; in the order of `work`. For a task that is `Classifying`.

        A client's rows meet its own adapter and the earlier layers of its own head.
        """
        ...

    def gradients(self, models: Sequence[ClientModel], rows: Sequence[Rows], reduce: Sequence[Reduce]) -> list[Factors]:
        """What each client's `reduce` makes of its gradient.

        It is the gradient of the client's mean loss over its rows, with respect to the product B C A of every adapted
        layer. It is as large as these layers, so `reduce` is called where it was computed, and one client at a time is
        in a worker's memory. The models' updates should be zero.

        Raises FedtriError for a client whose rows carry no loss.
        """
        ...


def minibatches(rows: Rows, how: Optimization, seed: int) -> Iterator[Rows]:
    """A client's minibatches of one round: whole reshuffled epochs, cut at `steps` (or after `epochs`)."""
    rng = np.random.default_rng(seed)
    per_epoch = -(-len(rows) // how.batch_size)
    total = how.steps if how.epochs is None else max(1, round(how.epochs * per_epoch))
    assert total is not None
    order = rows
    for step in range(total):
        if step % per_epoch == 0:
            order = rng.permutation(rows)
        start = step % per_epoch * how.batch_size
        yield order[start : start + how.batch_size]
