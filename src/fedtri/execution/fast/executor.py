"""Clients' minibatches share passes through one copy of the frozen model, on as many cores as there are.

Per step one minibatch a client. Nearly equal groups of clients share passes of up to the token budget, their texts end
to end. A client's loss is the mean over its own minibatch, its gradient norm is clipped over its own factors, and its
AdamW is its own: what it learns does not depend, but for rounding, on who trains beside it.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from importlib import import_module
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from fedtri.adapters import model as adapters
from fedtri.adapters.bfloat16 import ROWS
from fedtri.adapters.layout import Factors, Key, Layout
from fedtri.adapters.model import AdaptedModel, Adapter
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
from fedtri.execution.fast.kept import Keeping, KeptStates
from fedtri.execution.fast.model import Frozen, SharedPass
from fedtri.execution.fast.sharing import dealt, merged, next_of, pooled
from fedtri.execution.fast.table import architecture_of
from fedtri.execution.recompute import Recomputation
from fedtri.execution.reference import ReferenceExecutor, batches, in_order, with_open_head
from fedtri.execution.steps import Steps, steps
from fedtri.execution.workers import Worker, shared, side_by_side
from fedtri.method import Trained
from fedtri.tasks import Examples, LearningTask
from fedtri.tasks.base import Batch, Classifying, to_device

T = TypeVar("T")


@dataclass(frozen=True)
class FastExecutor:
    """Clients of a model whose forward pass is written out here, several to a pass."""

    adapted: AdaptedModel
    task: LearningTask
    examples: Examples
    group: int = 0
    """How many clients train side by side and may share passes; 0: all."""
    token_budget: int = 1536
    """Tokens of a pass."""
    recompute: bool = False
    """Whether layers keep no activations while they learn, and are run again in the backward pass."""
    keeping: Keeping | None = None
    """The examples whose states below the first adapted layer are kept."""

    @property
    def layout(self) -> Layout:
        """The tensors that a client of this model has."""
        return self.adapted.layout

    def describe(self) -> str:
        """One line on how clients are executed."""
        return "fast executor: clients share passes of texts end to end"

    @cached_property
    def frozen(self) -> Frozen:
        """What all passes share."""
        fill = ROWS if self.adapted.mixed_precision and self.adapted.device.type == "cpu" else 1
        return Frozen(self.adapted, first_adapted(self.adapted), self.recompute, fill)

    @cached_property
    def kept(self) -> KeptStates | None:
        """The states that are kept, where layers below the first adapted one are frozen."""
        if self.keeping is None or self.frozen.first == 0:
            return None
        groups = [
            rows[places]
            for rows in self.keeping.rows
            for places in batches(self.examples.lengths[rows], self.token_budget, packed=True)
        ]
        return KeptStates(self.keeping, groups, self.examples.lengths, self._states)

    def train(
        self,
        work: Sequence[Training],
        learns: frozenset[str],
        how: Optimization,
        on_step: OnStep = lambda client, step, loss: None,
    ) -> list[Trained]:
        """See `Executor`. On a processor clients train side by side on as many cores as PyTorch has threads."""
        self._open()
        if how.schedule != "constant":
            import_module("transformers.optimization")  # once, not in each of the processes that fork off
        return [one for group in self._groups(work) for one in self._train(group, learns, how, on_step)]

    def _groups(self, work: Sequence[T]) -> list[Sequence[T]]:
        """The clients that are worked on at once: one where all of the model learns, and each client's is another."""
        size = 1 if self.layout.backbone else self.group or max(len(work), 1)
        return [work[start : start + size] for start in range(0, len(work), size)]

    def _train(
        self, work: Sequence[Training], learns: frozenset[str], how: Optimization, on_step: OnStep
    ) -> list[Trained]:
        # what learns lies where the workers share it, and is trained there
        learning = [self._learning(one.model, learns) for one in work]

        def fit(places: Sequence[int], worker: Worker) -> dict[int, float]:
            clients = {place: _Client.of(self.adapted, work[place], learning[place], how) for place in places}
            losses: dict[int, list[float]] = {place: [] for place in places}
            minibatch = {place: minibatches(work[place].rows, how, work[place].seed) for place in places}
            while not worker.stop() and (batch := next_of(minibatch)):
                found: dict[int, float] = {}
                for group in self._sharing(batch):
                    found |= self._backward(clients, {place: batch[place] for place in group})
                for place, loss in found.items():
                    clients[place].steps.take()
                    losses[place].append(loss)
                    worker.tell(work[place].model.client, len(losses[place]), loss)
            return {place: float(np.mean(own)) if own else 0.0 for place, own in losses.items()}

        tokens = [sum(map(self._tokens, minibatches(one.rows, how, one.seed))) for one in work]
        shares = self._shares(range(len(work)), tokens)
        losses = merged(side_by_side([partial(fit, share) for share in shares], on_step))
        results = []
        for place, (one, learnt) in enumerate(zip(work, learning, strict=True)):
            own = {key: value.to(self.adapted.dtype) for key, value in one.model.factors.items()}
            own |= {key: value.detach().cpu().clone() for key, value in learnt.items()}
            results.append(Trained(own, losses[place]))
        return results

    def evaluate(self, work: Sequence[Scoring]) -> list[dict[str, float]]:
        """See `Executor`."""
        self._open()
        return [one for group in self._groups(work) for one in self._evaluate(group)]

    def _evaluate(self, work: Sequence[Scoring]) -> list[dict[str, float]]:
        def score(places: Sequence[int], worker: Worker) -> dict[int, dict[str, float]]:
            found = self._scores({place: work[place] for place in places}, worker)
            for place in places:
                one = work[place]
                if one.further and not worker.stop():
                    self._load(one.model)
                    found[place] |= self.task.more_metrics(self.adapted.model, self.examples, one.rows, found[place])
            return found

        shares = self._shares(range(len(work)), [self._tokens(one.rows) for one in work])
        found = merged(side_by_side([partial(score, share) for share in shares], apart=True))
        return [found[place] for place in range(len(work))]

    def features(self, rows: Sequence[Rows]) -> list[Float[np.ndarray, "rows d"]]:
        """See `Executor`."""
        if self.layout.backbone:
            adapters.unload(self.adapted)

        def one(own: Rows, worker: Worker) -> Float[np.ndarray, "rows d"]:
            found = []
            with torch.inference_mode():
                for places in batches(self.examples.lengths[own], self.token_budget, packed=True):
                    at = SharedPass(self.frozen, (), np.zeros(len(places), np.int64))
                    batch = to_device(self.examples.batch(own[places]), self.adapted.device)
                    found.append((places, self.task.features(at, batch)))
            return in_order(found)

        return side_by_side([partial(one, own) for own in rows])

    def head_inputs(self, work: Sequence[Scoring]) -> list[HeadInputs]:
        """See `Executor`."""
        self._open()
        assert isinstance(self.task, Classifying)
        score = self.task.logits_and_classes

        @torch.inference_mode()
        def one(own: Scoring, worker: Worker) -> HeadInputs:
            model, nobody = with_open_head(self.layout, own.model), np.zeros(len(own.rows), np.int64)
            if self.layout.backbone:
                self._load(model)
            client = _adapter(self.adapted, model, {})
            return HeadInputs.of([
                (np.repeat(chosen, self.examples.terms[own.rows[chosen]]), *found)
                for chosen, found in self._passes([client], nobody, own.rows, score)
            ])  # fmt: skip

        return side_by_side([partial(one, own) for own in work], apart=bool(self.layout.backbone))

    def gradients(self, models: Sequence[ClientModel], rows: Sequence[Rows], reduce: Sequence[Reduce]) -> list[Factors]:
        """See `Executor`. By the plain code, as it is done once in a run."""
        again = Recomputation(self.adapted.model) if self.recompute else None
        plain = ReferenceExecutor(self.adapted, self.task, self.examples, self.token_budget, again, self.group)
        return plain.gradients(models, rows, reduce)

    def _open(self) -> None:
        if self.kept is not None:
            self.kept.open()

    def _load(self, own: ClientModel) -> None:
        adapters.load(self.adapted, own.factors, rank=own.rank, alpha=own.alpha, classes=own.classes)

    def _tokens(self, rows: Rows) -> float:
        return float(self.examples.lengths[rows].sum())

    def _states(self, rows: Rows) -> Float[Tensor, "tokens d"]:
        """What enters the first adapted layer of these examples."""
        batch = to_device(self.examples.batch(rows), self.adapted.device)
        at = SharedPass(self.frozen, (), np.zeros(len(rows), np.int64))
        return at.below(**{name: batch[name] for name in batch if name in INPUTS})

    def _learning(self, own: ClientModel, learns: frozenset[str]) -> dict[Key, nn.Parameter]:
        """Copies of what learns of a client, where workers leave what they learn."""
        if self.layout.backbone:
            self._load(own)
            found = adapters.parameters(self.adapted, learns)
        else:
            keys = [key for key in self.layout.keys(learns - {"W"}) if key in own.factors]
            device, dtype = self.adapted.device, self.adapted.dtype
            found = {key: nn.Parameter(shared(own.factors[key].to(device, dtype, copy=True))) for key in keys}
        for parameter in found.values():
            parameter.requires_grad_()
        return found

    def _backward(self, clients: Mapping[int, "_Client"], batch: Mapping[int, Rows]) -> dict[int, float]:
        """Add each client's gradient of its own mean loss; returns these losses."""
        weight = {place: 1.0 / max(int(self.examples.terms[rows].sum()), 1) for place, rows in batch.items()}
        places = list(batch)
        owners, rows = pooled([batch[place] for place in places])
        losses = np.zeros(len(rows))
        for chosen, scores in self._passes(
            [clients[place].adapter for place in places], owners, rows, self.task.scores
        ):
            own = torch.tensor([weight[places[owner]] for owner in owners[chosen]], dtype=torch.float64)
            weighted = scores.loss * own.to(scores.loss)
            weighted.sum().backward()
            losses[chosen] = weighted.detach().double().cpu().numpy()
        return {place: float(losses[owners == number].sum()) for number, place in enumerate(places)}

    @torch.inference_mode()
    def _scores(self, work: Mapping[int, Scoring], worker: Worker) -> dict[int, dict[str, float]]:
        owners, rows = pooled([one.rows for one in work.values()])
        loss, correct = np.zeros(len(rows)), np.zeros(len(rows))
        if self.layout.backbone:
            (alone,) = work.values()
            self._load(alone.model)
        clients = [_adapter(self.adapted, one.model, {}) for one in work.values()]
        for chosen, scores in self._passes(clients, owners, rows, self.task.scores):
            if worker.stop():
                break
            loss[chosen] = scores.loss.double().cpu().numpy()
            correct[chosen] = scores.correct.double().cpu().numpy()
        found = {}
        for number, (place, one) in enumerate(work.items()):
            terms, own = max(int(self.examples.terms[one.rows].sum()), 1), owners == number
            found[place] = {"loss": float(loss[own].sum()) / terms, "accuracy": float(correct[own].sum()) / terms}
        return found

    def _passes(
        self, clients: Sequence[Adapter], owners: Rows, rows: Rows, score: Callable[[Any, Batch], T]
    ) -> Iterator[tuple[Rows, T]]:
        """(places among `rows`, what the task makes of them) of each pass."""
        for chosen in batches(self.examples.lengths[rows], self.token_budget, packed=True):
            chosen = chosen[np.argsort(owners[chosen], kind="stable")]
            states = None if self.kept is None else self.kept.of(rows[chosen])
            at = SharedPass(self.frozen, clients, owners[chosen], states)
            yield chosen, score(at, to_device(self.examples.batch(rows[chosen]), self.adapted.device))

    def _sharing(self, batch: Mapping[int, Rows]) -> list[list[int]]:
        """The clients whose minibatches go through the model together: nearly equal groups of no more than the budget;
        all on a GPU.

        A larger product is a faster one, until what it leaves no longer fits the processor's cache.
        """
        places = list(batch)
        if self.adapted.device.type != "cpu":
            return [places]
        tokens = [self._tokens(batch[place]) for place in places]
        groups: list[list[int]] = []
        for count in range(min(max(1, math.ceil(sum(tokens) / self.token_budget)), len(places)), len(places) + 1):
            groups = dealt(list(range(len(tokens))), tokens, count)
            if max(sum(tokens[index] for index in group) for group in groups) <= self.token_budget:
                break
        return [sorted(places[index] for index in group) for group in groups]

    def _shares(self, places: Sequence[int], tokens: Sequence[float]) -> list[list[int]]:
        """The clients dealt to as many workers as PyTorch has threads; all to one on a GPU."""
        workers = 1 if self.adapted.device.type != "cpu" else min(torch.get_num_threads(), len(places))
        return dealt(places, tokens, workers)


INPUTS = ("input_ids", "attention_mask", "token_type_ids")


@dataclass(frozen=True)
class _Client:
    """A client that trains: its tensors by layer, those that learn among them, and its optimiser."""

    adapter: Adapter
    steps: Steps

    @staticmethod
    def of(adapted: AdaptedModel, work: Training, learning: Mapping[Key, nn.Parameter], how: Optimization) -> "_Client":
        return _Client(_adapter(adapted, work.model, learning), steps(learning, work, how))


def _adapter(adapted: AdaptedModel, own: ClientModel, learning: Mapping[Key, nn.Parameter]) -> Adapter:
    """A client's tensors by layer, with the parameters that learn in their places."""
    return adapters.adapter(adapted, {**own.factors, **learning}, rank=own.rank, alpha=own.alpha, classes=own.classes)


def first_adapted(adapted: AdaptedModel) -> int:
    """The number of the first layer with an adapter; 0 where something below or beside the layers has one, or all
    learns."""
    layers = architecture_of(adapted.model).layers(adapted.model.base_model)
    names = {id(module): name for name, module in adapted.model.named_modules()}
    starts = [f"{names[id(layer)]}." for layer in layers]
    found = [
        next((number for number, start in enumerate(starts) if layer.name.startswith(start)), 0)
        for layer in adapted.layout.layers
    ]
    return 0 if adapted.layout.backbone else min(found, default=0)
