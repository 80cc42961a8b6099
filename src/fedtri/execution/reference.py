"""What training and scoring a client means, in plain PyTorch, one client at a time.

Batches are padded and go through the model's own forward pass. Every other executor must give the same results
(float64: 1e-9).

A client's loss on a minibatch is the mean over the minibatch's loss terms (one a class, one a token of a response):
Σ loss of each example / Σ terms of each example. Its gradient goes to `steps.py`. Dropout is off.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from fedtri.adapters import model as adapters
from fedtri.adapters.layer import weight_of
from fedtri.adapters.layout import Factors, Layout
from fedtri.adapters.model import AdaptedModel
from fedtri.errors import FedtriError
from fedtri.execution.executor import (
    ClientModel,
    HeadInputs,
    OnStep,
    Optimization,
    Reduce,
    Rows,
    Scoring,
    Training,
    minibatches,
)
from fedtri.execution.recompute import Recomputation
from fedtri.execution.steps import steps
from fedtri.execution.workers import Worker, side_by_side
from fedtri.method import Trained
from fedtri.tasks import Examples, LearningTask
from fedtri.tasks.base import Classifying, to_device


@dataclass(frozen=True)
class ReferenceExecutor:
    """Clients one after another on the model itself."""

    adapted: AdaptedModel
    task: LearningTask
    examples: Examples
    token_budget: int = 1536
    """Tokens that go through the model at once, padding included; memory's limit, no result changes with it."""
    recomputation: Recomputation | None = None
    """Given where layers are to keep no activations while they learn."""
    group: int = 1
    """How many clients go side by side, each worker in a process of its own; 0: all."""
    why: str = "one client at a time"

    @property
    def layout(self) -> Layout:
        """The tensors that a client of this model has."""
        return self.adapted.layout

    def describe(self) -> str:
        """One line on how clients are executed."""
        return f"reference executor: {self.why}"

    def train(
        self,
        work: Sequence[Training],
        learns: frozenset[str],
        how: Optimization,
        on_step: OnStep = lambda client, step, loss: None,
    ) -> list[Trained]:
        """See `Executor`."""
        return self._all([partial(self._train, one, learns, how) for one in work], on_step)

    def evaluate(self, work: Sequence[Scoring]) -> list[dict[str, float]]:
        """See `Executor`."""
        return self._all([partial(self._evaluate, one) for one in work])

    def features(self, rows: Sequence[Rows]) -> list[Float[np.ndarray, "rows d"]]:
        """See `Executor`."""
        adapters.unload(self.adapted)
        return self._all([partial(self._features, own) for own in rows])

    def head_inputs(self, work: Sequence[Scoring]) -> list[HeadInputs]:
        """See `Executor`."""
        return self._all([partial(self._head_inputs, one) for one in work])

    def gradients(self, models: Sequence[ClientModel], rows: Sequence[Rows], reduce: Sequence[Reduce]) -> list[Factors]:
        """See `Executor`."""
        work = zip(models, rows, reduce, strict=True)
        return self._all([partial(self._gradient, *one) for one in work])

    def _all(self, jobs: Sequence[Callable[[Worker], Any]], heard: Callable[..., None] = lambda *said: None) -> list:
        size = self.group or max(len(jobs), 1)
        groups = [jobs[start : start + size] for start in range(0, len(jobs), size)]
        return [found for group in groups for found in side_by_side(group, heard, apart=True)]

    def _train(self, work: Training, learns: frozenset[str], how: Optimization, worker: Worker) -> Trained:
        self._load(work.model)
        learning = adapters.parameters(self.adapted, learns)
        for parameter in learning.values():
            parameter.requires_grad_()
        optimizer = steps(learning, work, how)
        losses: list[float] = []
        if self.recomputation:
            self.recomputation.learning(True)
        for rows in minibatches(work.rows, how, work.seed):
            if worker.stop():
                break
            terms, loss = max(int(self.examples.terms[rows].sum()), 1), 0.0
            for chosen in self._micro_batches(rows):
                scores = self._scores(chosen)
                (scores.loss.sum() / terms).backward()
                loss += float(scores.loss.detach().double().sum()) / terms
            optimizer.take()
            losses.append(loss)
            worker.tell(work.model.client, len(losses), loss)
        if self.recomputation:
            self.recomputation.learning(False)
        self.adapted.model.requires_grad_(False)
        own = {key: value.to(self.adapted.dtype) for key, value in work.model.factors.items()}
        return Trained(own | adapters.read(self.adapted, learns), float(np.mean(losses)) if losses else 0.0)

    @torch.no_grad()
    def _evaluate(self, work: Scoring, worker: Worker) -> dict[str, float]:
        self._load(work.model)
        terms = max(int(self.examples.terms[work.rows].sum()), 1)
        found = {"loss": 0.0, "accuracy": 0.0}
        for chosen in self._micro_batches(work.rows):
            if worker.stop():
                break
            scores = self._scores(chosen)
            found["loss"] += float(scores.loss.double().sum()) / terms
            found["accuracy"] += float(scores.correct.double().sum()) / terms
        if work.further:
            found |= self.task.more_metrics(self.adapted.model, self.examples, work.rows, found)
        return found

    @torch.no_grad()
    def _features(self, rows: Rows, worker: Worker) -> Float[np.ndarray, "rows d"]:
        found = []
        for places in batches(self.examples.lengths[rows], self.token_budget):
            batch = to_device(self.examples.batch(rows[places]), self.adapted.device)
            found.append((places, self.task.features(self.adapted.model, batch)))
        return in_order(found)

    @torch.no_grad()
    def _head_inputs(self, work: Scoring, worker: Worker) -> HeadInputs:
        assert isinstance(self.task, Classifying)
        self._load(with_open_head(self.layout, work.model))
        found = []
        for places in batches(self.examples.lengths[work.rows], self.token_budget):
            rows = work.rows[places]
            batch = to_device(self.examples.batch(rows), self.adapted.device)
            owners = np.repeat(places, self.examples.terms[rows])
            found.append((owners, *self.task.logits_and_classes(self.adapted.model, batch)))
        return HeadInputs.of(found)

    def _gradient(self, model: ClientModel, rows: Rows, reduce: Reduce, worker: Worker) -> Factors:
        """By autograd on a dense W of zeros beside each layer's frozen weight, whatever type that is kept in."""
        if not (terms := int(self.examples.terms[rows].sum())):
            raise FedtriError(
                f"basis: {model.client} has no training example with a label or a response, so its loss has no "
                'gradient; give it some, or choose basis = "weights"'
            )
        self._load(model)
        layers = {layer.name: self.adapted.layer(layer.name) for layer in self.layout.layers}
        dense = {layer.name: torch.zeros(layer.d_out, layer.d_in) for layer in self.layout.layers}
        for name, layer in layers.items():
            layer.factors["W"] = nn.Parameter(dense[name].to(self.adapted.device, self.adapted.dtype))
        if self.recomputation:
            self.recomputation.learning(True)
        for chosen in self._micro_batches(rows):
            if worker.stop():
                break
            (self._scores(chosen).loss.sum() / terms).backward()
        if self.recomputation:
            self.recomputation.learning(False)
        for name, layer in layers.items():
            gradient = layer.factors["W"].grad
            if gradient is not None:  # else a layer that this task does not use
                dense[name] = gradient * weight_of(layer.base) if self.adapted.kind == "hira" else gradient
        adapters.unload(self.adapted)
        return reduce(dense)

    def _load(self, own: ClientModel) -> None:
        adapters.load(self.adapted, own.factors, rank=own.rank, alpha=own.alpha, classes=own.classes)

    def _micro_batches(self, rows: Rows) -> Iterator[Rows]:
        return (rows[places] for places in batches(self.examples.lengths[rows], self.token_budget))

    def _scores(self, rows: Rows) -> Any:
        return self.task.scores(self.adapted.model, to_device(self.examples.batch(rows), self.adapted.device))


def with_open_head(layout: Layout, own: ClientModel) -> ClientModel:
    """The client's model, whose logits are what enters the last layer of its head."""
    return replace(own, factors=adapters.open_head(layout, own.factors), classes=None)


def in_order(parts: Sequence[tuple[Rows, Tensor]]) -> Float[np.ndarray, "rows d"]:
    """What was computed in parts, each with the rows it belongs to, as one float32 array."""
    found = np.empty((sum(len(rows) for rows, _ in parts), parts[0][1].shape[1]), np.float32)
    for rows, values in parts:
        found[rows] = values.float().cpu().numpy()
    return found


def batches(lengths: Rows, token_budget: int, *, packed: bool = False) -> Iterator[Rows]:
    """Places sorted by length, in runs whose size stays under the budget: count × longest, packed their sum."""
    order = np.argsort(lengths, kind="stable")
    start = 0
    for end in range(1, len(order) + 1):
        run = order[start : end + 1]
        if end == len(order) or (lengths[run].sum() if packed else len(run) * lengths[run[-1]]) > token_budget:
            yield order[start:end]
            start = end
