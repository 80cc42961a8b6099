"""A whole federation in one process: a configuration's data, dealt to clients, and the site that holds them all."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int

from fedtri.communication.in_process import LocalTransport
from fedtri.config import Config
from fedtri.data import Pool, load_pool
from fedtri.data.partition import Split, partition
from fedtri.errors import FedtriError
from fedtri.execution.executor import OnStep
from fedtri.federation.client import Site
from fedtri.messages import POOLED
from fedtri.method import Method
from fedtri.runs.opening import Data, Machine, Opened, open_model, open_site
from fedtri.runs.spec import Spec, columns_of, spec_of, task_of
from fedtri.storage.client_store import ClientStore
from fedtri.tasks import Recipe


@dataclass(frozen=True)
class Federation:
    """A federation that can run, and what is needed to read its results."""

    config: Config
    spec: Spec
    opened: Opened
    site: Site
    transport: LocalTransport

    @property
    def method(self) -> Method:
        """What travels and how it is combined."""
        return self.spec.method

    @property
    def recipe(self) -> Recipe:
        """What is learned."""
        return self.spec.recipe

    @property
    def processor(self) -> Any:
        """What turns examples into the model's inputs."""
        return self.opened.processor

    def own_labels(self, client: str) -> list[str] | None:
        """The names of the classes of a client's own head; None where it is everyone's."""
        own = self.site.classes.get(client)
        return None if own is None else [self.spec.labels[label] for label in own]

    def describe_clients(self) -> dict[str, dict[str, object]]:
        """Each client's sizes, its counts of each class, and what guessing its largest training class would score.

        The counts are None where there are no classes, the guess where no class is predicted.
        """
        table = {}
        labels = self.site.labels
        for client in self.spec.clients:
            split = self.site.splits[client]
            sizes = {"train": len(split.train), "validation": len(split.validation), "test": len(split.test)}
            if labels is None:
                table[client] = {**sizes, "labels": None, "guess": None}
                continue
            counts = np.bincount(labels[split.train], minlength=len(self.spec.labels))
            guess = float((labels[split.test] == counts.argmax()).mean()) if self.recipe.classifies else None
            table[client] = {**sizes, "labels": counts.tolist(), "guess": guess}
        return table


def build(
    config: Config,
    store: ClientStore,
    on_step: OnStep = lambda client, step, loss: None,
    method: Method | None = None,
) -> Federation:
    """The federation that a configuration describes.

    Args:
        config: The configuration.
        store: Where the clients' tensors are kept.
        on_step: Called after every local step.
        method: A method that takes the place of the one that the configuration names.

    Raises:
        FedtriError: In one line, on data, a model or settings that cannot be used.
    """
    pool, splits = deal(config)
    spec = spec_of(config, list(splits), pool.label_names, method=method)
    machine = Machine.of(config)
    opened = open_model(spec, machine)
    classes = _own_classes(pool, splits) if spec.own_classes else {}
    if spec.method.plan(0).pooled:
        splits = {**splits, POOLED: _pooled(splits)}
    examples = spec.recipe.examples(pool, opened.processor, spec.max_length)
    site = open_site(spec, machine, opened, Data(examples, splits, classes), store, on_step)
    return Federation(config, spec, opened, site, LocalTransport(site, spec.codec))


def deal(config: Config) -> tuple[Pool, dict[str, Split]]:
    """All examples, and which of them each client has. Raises FedtriError on data that cannot be used."""
    pool = load_pool(
        config.data, task_of(config).pool, columns=columns_of(config), limit=config.data_options.limit, seed=config.seed
    )
    shares = (config.split.train, config.split.validation, config.split.test)
    return pool, partition(pool, spec=config.partition, clients=config.clients, seed=config.seed, fractions=shares)


def _own_classes(pool: Pool, splits: Mapping[str, Split]) -> dict[str, Int[np.ndarray, "own"]]:
    """The classes that each client's examples hold, ascending. Raises FedtriError for a client of one class."""
    labels = pool.labels
    assert labels is not None
    found = {client: np.unique(labels[np.concatenate(list(vars(split).values()))]) for client, split in splits.items()}
    for client, own in sorted(found.items()):
        if len(own) < 2:
            raise FedtriError(
                f'labels: "own" leaves {client} with one class, {pool.label_names[own[0]]!r}, expected at least two '
                "to tell apart; choose a partition that gives each client more classes"
            )
    return found


def _pooled(splits: Mapping[str, Split]) -> Split:
    """Everyone's training examples; nobody's validation and test, on which the clients are scored one by one."""
    none = np.empty(0, np.int64)
    return Split(np.concatenate([split.train for split in splits.values()]), none, none)
