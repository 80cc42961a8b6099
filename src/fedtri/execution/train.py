"""The local loop over a cohort: the clients' minibatches go through one copy of the frozen backbone.

Per step one minibatch a client, sorted by length and cut into micro-batches under a token budget, which are packed
(packing.py) or padded only to their own longest. A client's loss is the mean over its own minibatch, its gradient
norm is clipped over its own factors, and its AdamW is its own: what it learns does not depend, but for rounding, on who
trains beside it.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import TypeVar

import numpy as np
import torch
from jaxtyping import Float, Int

from fedtri.adapters.bank import Cohort
from fedtri.adapters.layout import Factors
from fedtri.execution.workers import Worker, side_by_side
from fedtri.tasks import Examples, LearningTask, Scores
from fedtri.tasks.base import to_device

Rows = Int[np.ndarray, "_"]
OnStep = Callable[[int, int, float], None]
T = TypeVar("T")


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
    proximal: float = 0.0
    """μ of FedProx's μ/2 ‖θ − θ_received‖², over the factors that learn."""


@dataclass(frozen=True)
class Work:
    """One client's share of a cohort's pass: its slot, its training rows and its own seed."""

    slot: int
    rows: Rows
    seed: int
    anchor: Factors | None = None
    """What a proximal pull pulls towards; None: what the slot holds at the start."""


def minibatches(work: Work, how: Optimization) -> Iterator[Rows]:
    """A client's minibatches of one round: whole reshuffled epochs, cut at `steps` (or after `epochs`)."""
    rng = np.random.default_rng(work.seed)
    size = how.batch_size
    per_epoch = -(-len(work.rows) // size)
    total = how.steps if how.epochs is None else max(1, round(how.epochs * per_epoch))
    assert total is not None
    order = work.rows
    for step in range(total):
        if step % per_epoch == 0:
            order = rng.permutation(work.rows)
        start = step % per_epoch * size
        yield order[start : start + size]


def micro_batches(lengths: Rows, token_budget: int, *, packed: bool = False) -> Iterator[Rows]:
    """Positions sorted by length, in runs whose size stays under the budget: count × longest, packed their sum."""
    order = np.argsort(lengths, kind="stable")
    start = 0
    for end in range(1, len(order) + 1):
        run = order[start : end + 1]
        if end == len(order) or (lengths[run].sum() if packed else len(run) * lengths[run[-1]]) > token_budget:
            yield order[start:end]
            start = end


def train(
    cohort: Cohort,
    task: LearningTask,
    examples: Examples,
    works: Sequence[Work],
    how: Optimization,
    kinds: frozenset[str],
    *,
    token_budget: int = 1536,
    on_step: OnStep = lambda slot, step, loss: None,
) -> dict[int, float]:
    """Train every client of the cohort for one round; returns each slot's mean training loss over the round.

    `on_step(slot, step, loss)` hears of every client's steps, counted from 1. On a processor clients train side by
    side on as many cores as PyTorch has threads, and some of a core's share passes; on a GPU all do.
    """
    cohort.share()
    cohort.train_only(kinds)
    if how.schedule != "constant":
        import_module("transformers.optimization")  # once, not in each of the processes that fork off

    def fit(works: Sequence[Work], worker: Worker) -> dict[int, float]:
        learners = {work.slot: _Learner(cohort, work, how, kinds) for work in works}
        totals = {work.slot: (0.0, 0) for work in works}
        while not worker.stop() and (
            batches := {
                slot: rows for slot, learner in learners.items() if (rows := next(learner.batches, None)) is not None
            }
        ):
            for learner in learners.values():
                learner.zero()
            losses: dict[int, float] = {}
            for shared in _sharing(cohort, batches, examples, token_budget):
                losses |= _backward(cohort, task, examples, {slot: batches[slot] for slot in shared}, token_budget)
            for slot, loss in losses.items():
                learners[slot].step()
                totals[slot] = (totals[slot][0] + loss, totals[slot][1] + 1)
                worker.tell(slot, totals[slot][1], loss)
        return {slot: total / max(count, 1) for slot, (total, count) in totals.items()}

    tokens = [float(sum(examples.lengths[rows].sum() for rows in minibatches(work, how))) for work in works]
    shares = _shares(works, tokens, cohort)
    found = _merged(side_by_side([partial(fit, share) for share in shares], on_step))
    cohort.train_only(frozenset())
    return found


def _backward(
    cohort: Cohort, task: LearningTask, examples: Examples, batches: Mapping[int, Rows], token_budget: int
) -> dict[int, float]:
    """Accumulate each client's gradient of its own mean loss; returns these losses by slot."""
    owners, rows = _pool(batches)
    weights = {slot: 1.0 / max(int(examples.terms[own].sum()), 1) for slot, own in batches.items()}
    weight = np.array([weights[slot] for slot in owners])
    losses = np.zeros(len(rows))
    for chosen, scores in _passes(cohort, task, examples, owners, rows, token_budget):
        weighted = scores.loss * torch.as_tensor(weight[chosen]).to(scores.loss)
        weighted.sum().backward()
        losses[chosen] = weighted.detach().double().cpu().numpy()
    return {slot: float(losses[owners == slot].sum()) for slot in batches}


def evaluate(
    cohort: Cohort,
    task: LearningTask,
    examples: Examples,
    rows: Mapping[int, Rows],
    *,
    token_budget: int = 1536,
) -> dict[int, dict[str, float]]:
    """Each slot's mean loss and accuracy over its own rows."""

    cohort.share()

    def score(slots: Sequence[int], worker: Worker) -> dict[int, dict[str, float]]:
        owners, pooled = _pool({slot: rows[slot] for slot in slots})
        loss, correct = np.zeros(len(pooled)), np.zeros(len(pooled))
        with torch.inference_mode():
            for chosen, scores in _passes(cohort, task, examples, owners, pooled, token_budget):
                if worker.stop():
                    break
                loss[chosen] = scores.loss.double().cpu().numpy()
                correct[chosen] = scores.correct.double().cpu().numpy()
        result = {}
        for slot in slots:
            terms = max(int(examples.terms[rows[slot]].sum()), 1)
            own = owners == slot
            result[slot] = {"loss": float(loss[own].sum()) / terms, "accuracy": float(correct[own].sum()) / terms}
        return result

    shares = _shares(list(rows), [float(examples.lengths[own].sum()) for own in rows.values()], cohort)
    if not cohort.together:
        shares = [[slot] for share in shares for slot in share]
    return _merged(side_by_side([partial(score, share) for share in shares]))


def features(
    cohort: Cohort, task: LearningTask, examples: Examples, rows: Rows, *, token_budget: int = 1536
) -> Float[np.ndarray, "rows d"]:
    """The frozen, un-adapted backbone's feature of each row. The cohort's adapters are routed to an empty slot."""
    found: list[tuple[Rows, np.ndarray]] = []
    with torch.inference_mode():
        for chosen in micro_batches(examples.lengths[rows], token_budget, packed=cohort.packing is not None):
            cohort.route(np.zeros(len(chosen), np.int64), pack=True, examples=rows[chosen])
            batch = to_device(examples.batch(rows[chosen]), cohort)
            found.append((chosen, task.features(cohort.model, batch).float().cpu().numpy()))
    result = np.empty((len(rows), found[0][1].shape[1]), np.float32)
    for chosen, values in found:
        result[chosen] = values
    return result


def _pool(batches: Mapping[int, Rows]) -> tuple[Rows, Rows]:
    """(owners, rows): every client's rows end to end, and whose each one is."""
    owners = np.concatenate([np.full(len(own), slot, np.int64) for slot, own in batches.items()])
    return owners, np.concatenate(list(batches.values())).astype(np.int64)


def _sharing(cohort: Cohort, batches: Mapping[int, Rows], examples: Examples, token_budget: int) -> list[list[int]]:
    """The clients whose minibatches go through the model together: all on a GPU; on a processor nearly equal groups of
    no more than the budget, where clients can share passes.

    A larger product is a faster one, until what it leaves no longer fits the processor's cache.
    """
    if cohort.together:
        return [list(batches)]
    if not cohort.sharing:
        return [[slot] for slot in batches]
    tokens = [float(examples.lengths[rows].sum()) for rows in batches.values()]
    groups: list[list[int]] = []
    for count in range(min(max(1, math.ceil(sum(tokens) / token_budget)), len(batches)), len(batches) + 1):
        groups = _dealt(list(range(len(tokens))), tokens, count)
        if max(sum(tokens[index] for index in group) for group in groups) <= token_budget:
            break
    slots = list(batches)
    return [sorted(slots[index] for index in group) for group in groups]


def _shares(items: Sequence[T], weights: Sequence[float], cohort: Cohort) -> list[list[T]]:
    """The items dealt to as many workers as PyTorch has threads; all in one on a GPU."""
    return _dealt(items, weights, 1 if cohort.together else min(torch.get_num_threads(), len(items)))


def _dealt(items: Sequence[T], weights: Sequence[float], count: int) -> list[list[T]]:
    """The items in so many lists, heaviest first to the least laden."""
    shares: list[list[T]] = [[] for _ in range(count)]
    load = np.zeros(count)
    for index in np.argsort(-np.asarray(weights), kind="stable"):
        least = int(load.argmin())
        shares[least].append(items[index])
        load[least] += weights[index]
    return shares


def _merged(parts: Sequence[dict[int, T]]) -> dict[int, T]:
    """All entries of disjoint dictionaries, in the order of their keys."""
    return dict(sorted(entry for part in parts for entry in part.items()))


def _passes(
    cohort: Cohort, task: LearningTask, examples: Examples, owners: Rows, rows: Rows, token_budget: int
) -> Iterator[tuple[Rows, Scores]]:
    for chosen in micro_batches(examples.lengths[rows], token_budget, packed=cohort.packing is not None):
        chosen = chosen[np.argsort(owners[chosen], kind="stable")]
        cohort.route(owners[chosen], pack=True, examples=rows[chosen])
        yield chosen, task.scores(cohort, to_device(examples.batch(rows[chosen]), cohort))


class _Learner:
    """One client's minibatches, optimiser and schedule over its slices of the stacked factors."""

    def __init__(self, cohort: Cohort, work: Work, how: Optimization, kinds: frozenset[str]) -> None:
        self.batches, self.how = minibatches(work, how), how
        views = cohort.slices(work.slot, kinds)
        self.views = list(views.values())
        anchor = work.anchor or {}
        self.anchor = [
            view.detach().clone() if key not in anchor else cohort.expanded(work.slot, key, anchor[key].to(view))
            for key, view in views.items()
        ] if how.proximal else []  # fmt: skip
        self.optimizer = torch.optim.AdamW(
            self.views, lr=how.learning_rate, betas=how.betas, weight_decay=how.weight_decay, fused=True
        )
        self.schedule = _schedule(self.optimizer, work, how)

    def zero(self) -> None:
        for view in self.views:
            assert view.grad is not None
            view.grad.zero_()

    def step(self) -> None:
        """Proximal pull, clip this client's gradient norm, one AdamW step."""
        for view, anchor in zip(self.views, self.anchor, strict=False):
            assert view.grad is not None
            view.grad.add_(view.detach() - anchor, alpha=self.how.proximal)
        if self.how.clip is not None:
            torch.nn.utils.clip_grad_norm_(self.views, self.how.clip)
        self.optimizer.step()
        self.schedule.step()


def _schedule(optimizer: torch.optim.Optimizer, work: Work, how: Optimization) -> torch.optim.lr_scheduler.LRScheduler:
    """The learning rate's schedule over one round."""
    if how.schedule == "constant":
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1)
    from transformers.optimization import get_scheduler  # it imports PEFT, 2 s that a client's every call would pay

    return get_scheduler(how.schedule, optimizer, how.warmup, sum(1 for _ in minibatches(work, how)))
