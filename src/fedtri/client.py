"""The clients' half of a round: load, train, evaluate, split into what leaves home and what stays."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from fedtri import sketch, train
from fedtri.adapter import Cohort
from fedtri.data.partition import Split
from fedtri.seeds import derive
from fedtri.store import ClientStore
from fedtri.tasks import Examples, LearningTask
from fedtri.types import Factors, Method, Reply, Task, only

ALL = frozenset("ABCH")


@dataclass(frozen=True)
class Site:
    """All that the client side of a federation holds: one real client, or many simulated ones over one backbone."""

    cohort: Cohort
    task: LearningTask
    examples: Examples
    splits: Mapping[str, Split]
    ranks: Mapping[str, int]
    alpha: float
    method: Method
    optimization: train.Optimization
    initial: Callable[[str], Factors]
    """What a client starts from, derived from the run's seed."""
    store: ClientStore
    seed: int
    evaluate: bool = True
    validate: bool = False
    """Whether the validation split is scored too (early stopping needs it)."""
    token_budget: int = 1024
    on_step: Callable[[int, float], None] = lambda step, loss: None


def client_update(site: Site, tasks: Sequence[Task]) -> list[Reply]:
    """Answer the tasks of one phase of one round, one a client, at most as many as the cohort has slots."""
    for slot, task in enumerate(tasks):
        kept = site.initial(task.client) if task.phase == "sketch" else _kept(site, task)
        site.cohort.write(slot, kept, site.ranks[task.client], site.alpha)
    answer = {"sketch": _sketch, "train": _train, "evaluate": _evaluate}[tasks[0].phase]
    return answer(site, tasks)


def _kept(site: Site, task: Task) -> Factors:
    """The client's own tensors with what came down over them."""
    return {**(site.store.load(task.client) or site.initial(task.client)), **task.down}


def _sketch(site: Site, tasks: Sequence[Task]) -> list[Reply]:
    replies = []
    for task in tasks:
        rows = site.splits[task.client].train
        labels = site.examples.labels
        found = sketch.fit(
            train.features(site.cohort, site.task, site.examples, rows, token_budget=site.token_budget),
            None if labels is None else labels[rows],
            classes=site.task.classes,
            seed=derive(site.seed, "sketch", task.client) % 2**32,
        )
        replies.append(_reply(site, task, {}, sketch=found))
    return replies


def _train(site: Site, tasks: Sequence[Task]) -> list[Reply]:
    plan = site.method.plan(tasks[0].round)
    works = [
        train.Work(slot, site.splits[task.client].train, derive(site.seed, "batches", task.round, task.client))
        for slot, task in enumerate(tasks)
    ]
    how = replace(site.optimization, proximal=site.method.proximal)
    losses = train.train(
        site.cohort, site.task, site.examples, works, how, plan.train,
        token_budget=site.token_budget, on_step=site.on_step,
    )  # fmt: skip
    metrics = _scores(site, tasks) if site.evaluate else {slot: {} for slot in losses}
    replies = []
    for slot, task in enumerate(tasks):
        mine = site.cohort.read(slot, ALL)
        site.store.save(task.client, mine, f"{task.round + 1:05}-trained")
        replies.append(_reply(site, task, only(mine, plan.up), {"train_loss": losses[slot], **metrics[slot]}))
    return replies


def _evaluate(site: Site, tasks: Sequence[Task]) -> list[Reply]:
    for slot, task in enumerate(tasks):
        if task.down:
            site.store.save(task.client, site.cohort.read(slot, ALL), f"{task.round:05}-received")
    metrics = _scores(site, tasks) if site.evaluate else [{} for _ in tasks]
    return [_reply(site, task, {}, metrics[slot]) for slot, task in enumerate(tasks)]


def _scores(site: Site, tasks: Sequence[Task]) -> dict[int, dict[str, float]]:
    """Loss and accuracy on each client's test split (and loss on its validation split where asked), by slot."""
    splits = dict(enumerate(site.splits[task.client] for task in tasks))
    found = _on(site, {slot: split.test for slot, split in splits.items()})
    if site.validate:
        for slot, scores in _on(
            site, {s: split.validation for s, split in splits.items() if len(split.validation)}
        ).items():
            found[slot]["validation_loss"] = scores["loss"]
    return found


def _on(site: Site, rows: Mapping[int, np.ndarray]) -> dict[int, dict[str, float]]:
    return train.evaluate(site.cohort, site.task, site.examples, rows, token_budget=site.token_budget)


def _reply(site: Site, task: Task, up: Factors, metrics: Mapping[str, float] | None = None, **more: object) -> Reply:
    return Reply(task.client, task.round, up, len(site.splits[task.client].train), metrics or {}, **more)  # pyright: ignore[reportArgumentType]
