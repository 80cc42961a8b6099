"""The former training loop behind the new interface; goes when the executors are in place."""

from collections.abc import Sequence
from functools import partial
from importlib import import_module

import numpy as np

from fedtri.adapters.bank import Cohort
from fedtri.execution import train
from fedtri.execution.executor import OnStep, Optimization, Rows, Scoring, Training
from fedtri.execution.workers import Worker, side_by_side
from fedtri.method import Trained
from fedtri.tasks import Examples, LearningTask


class InterimExecutor:
    def __init__(self, cohort: Cohort, task: LearningTask, examples: Examples, token_budget: int) -> None:
        self.cohort, self.task, self.examples, self.token_budget = cohort, task, examples, token_budget
        self.layout = cohort.layout

    def describe(self) -> str:
        return "interim"

    def put(self, slot, model):
        self.cohort.write(slot, model.factors, model.rank, model.alpha, model.classes)

    def train(self, work: Sequence[Training], learns, how: Optimization, on_step: OnStep = lambda *a: None):
        found = []
        for start in range(0, len(work), self.cohort.clients):
            group = work[start : start + self.cohort.clients]
            for slot, one in enumerate(group):
                self.put(slot, one.model)
            works = [train.Work(slot, one.rows, one.seed, one.towards) for slot, one in enumerate(group)]
            old = train.Optimization(**vars(how), proximal=group[0].proximal)
            names = [one.model.client for one in group]
            losses = train.train(
                self.cohort, self.task, self.examples, works, old, learns, token_budget=self.token_budget,
                on_step=lambda slot, step, loss, names=names: on_step(names[slot], step, loss),
            )  # fmt: skip
            found += [Trained(self.cohort.read(s, self.layout.factors), losses[s]) for s in range(len(group))]
        return found

    def evaluate(self, work: Sequence[Scoring]):
        found = []
        for start in range(0, len(work), self.cohort.clients):
            group = work[start : start + self.cohort.clients]
            for slot, one in enumerate(group):
                self.put(slot, one.model)
            rows = {slot: one.rows for slot, one in enumerate(group)}
            scores = train.evaluate(self.cohort, self.task, self.examples, rows, token_budget=self.token_budget)
            more = {s: r for s, r in rows.items() if group[s].further}
            further = self.task.more_metrics(self.cohort, self.examples, more, {s: scores[s] for s in more})
            found += [{**scores[s], **further.get(s, {})} for s in range(len(group))]
        return found

    def features(self, rows: Sequence[Rows]):
        import_module("sklearn.mixture")
        self.cohort.share()

        def one(own: Rows, _: Worker) -> np.ndarray:
            return train.features(self.cohort, self.task, self.examples, own, token_budget=self.token_budget)

        return side_by_side([partial(one, own) for own in rows])
