"""The clients' half of a round: load, train, evaluate, split into what leaves home and what stays."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from importlib import import_module

import numpy as np
import torch

from fedtri import sketch, train, wire
from fedtri.cohort import Cohort
from fedtri.factors import folded, initial_factors
from fedtri.seeds import derive
from fedtri.store import ClientStore
from fedtri.tasks import Examples, LearningTask
from fedtri.types import Factors, Method, Reply, Split, Task, only
from fedtri.workers import Worker, side_by_side


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
    classes: Mapping[str, np.ndarray] = field(default_factory=dict)
    """The classes of each client's own head, where these differ; empty where all have all."""
    evaluate: bool = True
    """Whether clients are scored after local training too; where they are asked to evaluate, they do."""
    validate: bool = False
    """Whether the validation split is scored too (early stopping needs it)."""
    token_budget: int = 1536
    on_step: Callable[[int, int, float], None] = lambda slot, step, loss: None

    def put(self, slot: int, client: str, factors: Factors) -> None:
        """A client's tensors into a slot of the cohort, with its rank, scale and classes."""
        self.cohort.write(slot, factors, self.ranks[client], self.alpha, self.classes.get(client))


def client_update(site: Site, tasks: Sequence[Task]) -> list[Reply]:
    """Answer the tasks of one phase of one round, one a client, at most as many as the cohort has slots."""
    for slot, task in enumerate(tasks):
        own = site.initial(task.client) if task.phase == "sketch" else kept(site, task)
        site.put(slot, task.client, own)
    answer = {"sketch": _sketch, "train": _train, "evaluate": _evaluate}[tasks[0].phase]
    return answer(site, tasks)


def personal_id(client: str) -> str:
    """The name under which a client's personal copy is kept."""
    return f"{client}.personal"


def residual_id(client: str) -> str:
    """The name under which is kept what rounding to int8 has lost so far."""
    return f"{client}.residual"


def rounded(store: ClientStore, reply: Reply, dtype: str) -> Reply:
    """The reply as it is to be encoded in this number type, with error feedback where that is int8.

    x = up + e travels as Q(x), and e = x - Q(x) stays home for the next round (arXiv:1901.09847). A reply that is not
    finite goes as it is, for the server to refuse.
    """
    if dtype != "int8" or not all(value.isfinite().all() for value in reply.up.values()):
        return reply
    lost = store.load(residual_id(reply.client)) or {}
    up = {key: value + lost[key] if key in lost else value for key, value in reply.up.items()}
    now = {key: value - wire.quantized(value, dtype) for key, value in up.items()}
    if now:
        store.save(residual_id(reply.client), {**lost, **now}, f"{reply.round + 1:05}-trained")
    return replace(reply, up=up)


def kept(site: Site, task: Task) -> Factors:
    """The client's own tensors with what came down over them, which may start others anew."""
    own = {**(site.store.load(task.client) or site.initial(task.client)), **task.down}
    came = {key.factor for key in task.down}
    if site.method.fresh and "W" in came:
        seed = derive(site.seed, "fresh", task.round)
        own |= initial_factors(site.cohort.layout, {}, rank=site.ranks[task.client], seed=seed)
    if "C" in came:
        own |= {key: torch.ones_like(value) for key, value in own.items() if key.factor == "S"}
    return own


def _sketch(site: Site, tasks: Sequence[Task]) -> list[Reply]:
    import_module("sklearn.mixture")  # once, not in each of the processes that fork off
    site.cohort.share()

    def answer(task: Task, _: Worker) -> Reply:
        rows = site.splits[task.client].train
        labels = site.examples.labels
        found = sketch.fit(
            train.features(site.cohort, site.task, site.examples, rows, token_budget=site.token_budget),
            None if labels is None else labels[rows],
            classes=site.task.classes,
            seed=derive(site.seed, "sketch", task.client) % 2**32,
        )
        return _reply(site, task, {}, sketch=found)

    return side_by_side([partial(answer, task) for task in tasks])


def _train(site: Site, tasks: Sequence[Task]) -> list[Reply]:
    plan = site.method.plan(tasks[0].round)
    works = [
        train.Work(slot, site.splits[task.client].train, derive(site.seed, "batches", task.round, task.client))
        for slot, task in enumerate(tasks)
    ]
    personal = site.method.personal
    follows = personal is not None and personal.pull is not None
    received = {slot: site.cohort.read(slot, plan.train) for slot, _ in enumerate(tasks)} if personal else {}
    losses = _fit(site, works, personal.proximal if personal and follows else site.method.proximal, plan.train)
    metrics = _scores(site, tasks)
    mine = {slot: site.cohort.read(slot, site.cohort.layout.factors) for slot, _ in enumerate(tasks)}
    if personal is not None:
        if not follows:
            _train_personal(site, tasks, works, personal.proximal, received)
        for slot, scores in (metrics if follows else _scores(site, tasks)).items():
            metrics[slot] = {**metrics[slot], **{f"{name}_personal": value for name, value in scores.items()}}
        for slot, task in enumerate(tasks):
            copy = site.cohort.read(slot, site.cohort.layout.factors)
            site.store.save(personal_id(task.client), copy, f"{task.round + 1:05}-trained")
    if personal is not None and personal.pull is not None:
        for slot, start in received.items():
            mine[slot] |= {key: torch.lerp(start[key], mine[slot][key], personal.pull) for key in start}
    replies = []
    for slot, task in enumerate(tasks):
        site.store.save(task.client, mine[slot], f"{task.round + 1:05}-trained")
        up = only(folded(mine[slot]), plan.up)
        replies.append(_reply(site, task, up, {"train_loss": losses[slot], **metrics[slot]}))
    return replies


def _fit(site: Site, works: Sequence[train.Work], proximal: float, kinds: frozenset[str]) -> dict[int, float]:
    return train.train(
        site.cohort, site.task, site.examples, works, replace(site.optimization, proximal=proximal), kinds,
        token_budget=site.token_budget, on_step=site.on_step,
    )  # fmt: skip


def _train_personal(
    site: Site, tasks: Sequence[Task], works: Sequence[train.Work], proximal: float, received: Mapping[int, Factors]
) -> None:
    """Leave in every slot the client's personal copy, trained for as many steps again near what was received."""
    for slot, task in enumerate(tasks):
        copy = site.store.load(personal_id(task.client)) or received[slot]
        site.put(slot, task.client, copy)
    again = [
        replace(work, seed=derive(work.seed, "personal"), anchor=received[slot]) for slot, work in enumerate(works)
    ]
    _fit(site, again, proximal, site.method.plan(tasks[0].round).train)


def _evaluate(site: Site, tasks: Sequence[Task]) -> list[Reply]:
    for slot, task in enumerate(tasks):
        if task.down:
            mine = site.cohort.read(slot, site.cohort.layout.factors)
            site.store.save(task.client, mine, f"{task.round:05}-received")
    metrics = _scores(site, tasks)
    return [_reply(site, task, {}, metrics[slot]) for slot, task in enumerate(tasks)]


def _scores(site: Site, tasks: Sequence[Task]) -> dict[int, dict[str, float]]:
    """Each client's metrics on its test split (and loss on its validation split where asked), by slot."""
    splits = dict(enumerate(site.splits[task.client] for task in tasks))
    found: dict[int, dict[str, float]] = {slot: {} for slot in splits}
    if tasks[0].phase == "train" and not site.evaluate:
        return found  # the last delivery is scored all the same
    tested = {slot: split.test for slot, split in splits.items() if len(split.test)}
    for slot, scores in (measured := _on(site, tested)).items():
        found[slot] = dict(scores)
    for slot, scores in site.task.more_metrics(site.cohort, site.examples, tested, measured).items():
        found[slot] |= scores
    if site.validate:
        for slot, scores in _on(site, {slot: split.validation for slot, split in splits.items()}).items():
            found[slot]["validation_loss"] = scores["loss"]
    return found


def _on(site: Site, rows: Mapping[int, np.ndarray]) -> dict[int, dict[str, float]]:
    rows = {slot: own for slot, own in rows.items() if len(own)}
    if not rows:
        return {}
    return train.evaluate(site.cohort, site.task, site.examples, rows, token_budget=site.token_budget)


def _reply(site: Site, task: Task, up: Factors, metrics: Mapping[str, float] | None = None, **more: object) -> Reply:
    return Reply(task.client, task.round, up, len(site.splits[task.client].train), metrics or {}, **more)  # pyright: ignore[reportArgumentType]
