"""From a configuration to a federation that can run: model, data, method, clients and transport."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from fedtri import methods, tasks
from fedtri.adapters.initial import initial_factors
from fedtri.adapters.layout import Key, Layout
from fedtri.adapters.model import AdaptedModel, install, of_classes
from fedtri.aggregation import server_optimizers
from fedtri.communication.in_process import LocalTransport
from fedtri.config import Config
from fedtri.data import Pool, load_pool
from fedtri.data.partition import Split, partition
from fedtri.errors import FedtriError
from fedtri.execution import build as executors
from fedtri.execution.executor import Optimization
from fedtri.execution.fast.kept import Keeping
from fedtri.federation.client import Site
from fedtri.federation.loop import Schedule
from fedtri.federation.server import Expectation, sample
from fedtri.messages import POOLED
from fedtri.method import Method
from fedtri.models import loading
from fedtri.models.peft import read_peft
from fedtri.seeds import derive
from fedtri.state import Scales
from fedtri.storage.client_store import ClientStore
from fedtri.tasks import Examples, LearningTask, Recipe


@dataclass(frozen=True)
class Federation:
    """Everything `engine.run` takes, and what reading its results needs."""

    config: Config
    method: Method
    adapted: AdaptedModel
    site: Site
    transport: LocalTransport
    expected: Expectation
    schedule: Schedule
    recipe: Recipe
    processor: Any
    label_names: tuple[str, ...]

    def own_labels(self, client: str) -> list[str] | None:
        """The names of the classes of a client's own head; None where it is everyone's."""
        own = self.site.classes.get(client)
        return None if own is None else [self.label_names[label] for label in own]

    def describe_clients(self) -> dict[str, dict[str, object]]:
        """Each client's sizes, its counts of each class, and what guessing its largest training class would score.

        The counts are None where there are no classes, the guess where no class is predicted.
        """
        table = {}
        labels = self.site.labels
        for client in self.transport.clients():
            split = self.site.splits[client]
            sizes = {"train": len(split.train), "validation": len(split.validation), "test": len(split.test)}
            if labels is None:
                table[client] = {**sizes, "labels": None, "guess": None}
                continue
            counts = np.bincount(labels[split.train], minlength=len(self.label_names))
            guess = float((labels[split.test] == counts.argmax()).mean()) if self.recipe.classifies else None
            table[client] = {**sizes, "labels": counts.tolist(), "guess": guess}
        return table


def build(config: Config, store: ClientStore) -> Federation:
    """The federation a config describes, its clients' tensors kept in `store`. Raises FedtriError on bad input."""
    method = choose_method(config)
    recipe = choose_task(config)
    pool = load_pool(
        config.data, recipe.pool, columns=columns(config), limit=config.data_options.limit, seed=config.seed
    )
    shares = (config.split.train, config.split.validation, config.split.test)
    splits = partition(pool, spec=config.partition, clients=config.clients, seed=config.seed, fractions=shares)
    adapted, processor, head = load_model(config, pool.label_names)
    return assemble(config, method, pool, splits, adapted, processor, head, store)


def choose_task(config: Config) -> Recipe:
    """The task a config describes, with its options. Raises FedtriError for one that has no use for a column given."""
    return tasks.build(config.task, config.task_options, columns(config))


def columns(config: Config) -> dict[str, str]:
    """The columns that are given, by role."""
    return {role: name for role, name in config.columns.model_dump().items() if name is not None}


def choose_method(config: Config) -> Method:
    """The method a config describes, with its options, head, kind of adapter and server optimiser."""
    server = config.server
    step = None
    if server.optimizer != "none":
        betas = (server.betas[0], server.betas[1])
        step = server_optimizers.optimizer(server.optimizer, learning_rate=server.learning_rate, betas=betas)
    method = methods.build(
        config.method, config.method_options, head=config.head, adapter=config.adapter, optimizer=step
    )
    if not isinstance(config.rank, int) and not method.adapter.mixed_ranks:
        raise FedtriError(
            f"rank: {method.name} needs one rank for all clients, got {config.rank!r}; give one number, or choose of "
            f"{', '.join(name for name in methods.METHODS if methods.build(name).adapter.mixed_ranks)}"
        )
    return method


def client_ranks(rank: int | list[int] | str, clients: Sequence[str], seed: int) -> dict[str, int]:
    """Every client's rank: one for all, one each in the order of their names, or "uniform:LOW,HIGH".

    The last draws an integer from LOW to HIGH, both included and equally likely, from the run's seed and the client's
    name. Raises FedtriError where the list is not as long as the clients are many, or LOW is above HIGH.
    """
    if isinstance(rank, int):
        return dict.fromkeys(clients, rank)
    if isinstance(rank, list):
        if len(rank) != len(clients):
            raise FedtriError(f"rank: expected {len(clients)} ranks, one a client, got {len(rank)}")
        return dict(zip(clients, rank, strict=True))
    low, high = (int(part) for part in rank.removeprefix("uniform:").split(","))
    if low > high:
        raise FedtriError(f"rank: expected uniform:LOW,HIGH with LOW up to HIGH, got {rank!r}")
    return {client: low + derive(seed, "rank", client) % (high - low + 1) for client in clients}


def largest_rank(rank: int | list[int] | str) -> int:
    """The largest rank that `client_ranks` can give a client: what every layer must have room for."""
    if isinstance(rank, int):
        return rank
    return max(rank) if isinstance(rank, list) else int(rank.rpartition(",")[2])


def load_model(config: Config, label_names: tuple[str, ...]) -> tuple[AdaptedModel, Any, Mapping[Key, Tensor]]:
    """The model with adapters, its processor, and the head everyone starts from.

    Beside the head stand the tensors that start as the model has them: DoRA's magnitudes, a backbone that learns.
    """
    recipe, method = choose_task(config), choose_method(config)
    device, how = _device(config.device), config.model_options
    loaded = recipe.load(config.model, label_names, loading.Weights(how.dtype, how.quantization, str(device)))
    model, layers = loaded.model, recipe.head(loaded.model)
    head = loading.initial_head(model, layers, loaded.fresh, config.seed)
    adapted = install(
        model if how.quantization != "none" else model.to(device),
        targets=[] if "P" in method.adapter.extra else loading.find_targets(model, config.targets, config.layers),
        head=layers,
        rank=largest_rank(config.rank),
        kind=config.adapter,
        extra=method.adapter.extra,
        heads=method.adapter.heads,
        mixed_precision=how.mixed_precision == "bfloat16",
    )
    return adapted, loaded.processor, {**head, **adapted.initial}


def start(
    config: Config, adapted: AdaptedModel, head: Mapping[Key, Tensor], basis: str, rank: int | None = None
) -> dict[Key, Tensor]:
    """What a client of this rank (or the largest) starts from: the seed's factors, or a PEFT adapter's A and B."""
    rank = largest_rank(config.rank) if rank is None else rank
    factors = initial_factors(adapted.layout, head, rank=rank, seed=config.seed, basis=basis)
    if config.init_adapter is not None:
        if basis != "kaiming":
            raise FedtriError("init_adapter: this method freezes A and B in a basis of its own; leave init_adapter out")
        factors |= read_peft(config.init_adapter, adapted.layout, rank, config.lora_alpha)
    return factors


def assemble(
    config: Config,
    method: Method,
    pool: Pool,
    splits: Mapping[str, Split],
    adapted: AdaptedModel,
    processor: Any,
    head: Mapping[Key, Tensor],
    store: ClientStore,
) -> Federation:
    """The federation over data, splits and a model that are already at hand."""
    recipe = choose_task(config)
    ranks = client_ranks(config.rank, sorted(splits), config.seed)
    classes = own_classes(recipe, method, pool, splits, adapted.layout) if config.labels == "own" else {}
    first = {rank: start(config, adapted, head, method.adapter.basis, rank) for rank in set(ranks.values())}
    local = optimization(config)
    if method.plan(0).pooled:
        taking_part = len(sample(sorted(splits), config.fraction, 0, config.seed))
        local = replace(local, steps=local.steps and local.steps * taking_part)
        splits, ranks = {**splits, POOLED: _pooled(splits)}, {**ranks, POOLED: max(ranks.values())}
    examples = recipe.examples(pool, processor, config.max_length)
    task = recipe.learning(pool.label_names, processor)
    scales = Scales(config.lora_alpha, ranks)
    keeping = kept_examples(config, splits, store.folder)
    executor = build_executor(config, adapted, task, examples, keeping)
    site = Site(
        executor=executor,
        method=method,
        splits=splits,
        scales=scales,
        optimization=local,
        initial=lambda client: of_classes(adapted.layout, first[ranks[client]], classes.get(client)),
        fresh=fresh(config, adapted.layout, ranks),
        store=store,
        seed=config.seed,
        labels=examples.labels,
        label_count=task.classes,
        classes=classes,
        evaluate=config.evaluate,
        validate=config.early_stopping.patience is not None,
    )
    if site.validate and not any(len(split.validation) for split in splits.values()):
        raise FedtriError("early_stopping.patience: needs validation examples; set split.validation above 0")
    return Federation(
        config=config,
        method=method,
        adapted=adapted,
        site=site,
        transport=LocalTransport(site, config.wire.dtype, task.feature_size(adapted.model) if method.welcome else 0),
        expected=Expectation(adapted.layout, scales, config.wire.norm_bound),
        schedule=Schedule(config.rounds, config.fraction, config.seed, config.evaluate, config.early_stopping.patience),
        recipe=recipe,
        processor=processor,
        label_names=pool.label_names,
    )


def own_classes(
    recipe: Recipe, method: Method, pool: Pool, splits: Mapping[str, Split], layout: Layout
) -> dict[str, Int[np.ndarray, "own"]]:
    """The classes that each client's examples hold, ascending: what it has a head for where `labels = "own"`.

    Raises FedtriError where heads cannot differ, because they travel or there are none, and for a client of one class.
    """
    if not recipe.classifies or not layout.head:
        raise FedtriError(f'labels: "own" needs a head with a row for each class, which task {recipe.name} has not; '
                          'set labels = "shared"')  # fmt: skip
    if method.plan(0).pooled or any("H" in method.plan(round).up | method.plan(round).down for round in range(2)):
        raise FedtriError(f'labels: "own" needs heads that stay at home, and {method.name} has one head for all; '
                          'set head = "personal", or choose another method')  # fmt: skip
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


def build_executor(
    config: Config, adapted: AdaptedModel, task: LearningTask, examples: Examples, keeping: Keeping | None = None
) -> executors.Executor:
    """The executor that a config asks for, over these examples."""
    return executors.build(
        adapted,
        task,
        examples,
        group=config.simulation.cohort,
        token_budget=config.simulation.token_budget,
        gradient_checkpointing=config.model_options.gradient_checkpointing,
        keeping=keeping,
    )


def kept_examples(config: Config, splits: Mapping[str, Split], folder: Path) -> Keeping | None:
    """The examples that a run meets more than once: what enters the first adapted layer may be kept for them."""
    if config.simulation.prefix_budget == 0:
        return None
    rows: list[np.ndarray] = []
    for client in sorted(set(splits) - {POOLED}):
        split = splits[client]
        drawn = len(split.train) * config.epochs if config.epochs else (config.steps or 0) * config.batch_size
        again = config.rounds * config.fraction * drawn > len(split.train)
        scored = [split.test, split.validation] if config.evaluate and config.rounds > 1 else []
        rows += [own for own in [*([split.train] if again else []), *scored] if len(own)]
    dtype = config.simulation.prefix_dtype
    return Keeping(
        rows,
        budget=config.simulation.prefix_budget << 20,
        folder=folder,
        dtype=None if dtype == "auto" else getattr(torch, dtype),
    )


def _pooled(splits: Mapping[str, Split]) -> Split:
    """Everyone's training examples; nobody's validation and test, on which the clients are scored one by one."""
    none = np.empty(0, np.int64)
    return Split(np.concatenate([split.train for split in splits.values()]), none, none)


def fresh(config: Config, layout: Layout, ranks: Mapping[str, int]) -> Callable[[str, int], dict[Key, Tensor]]:
    """A new draw of a client's A, C and B for a round, the same for all clients of one rank."""

    def draw(client: str, round: int) -> dict[Key, Tensor]:
        return initial_factors(layout, {}, rank=ranks[client], seed=derive(config.seed, "fresh", round))

    return draw


def optimization(config: Config) -> Optimization:
    """The local loop's settings."""
    table = config.optimizer
    return Optimization(
        steps=config.steps, epochs=config.epochs, batch_size=config.batch_size, learning_rate=config.learning_rate,
        schedule=table.schedule, warmup=table.warmup, weight_decay=table.weight_decay,
        betas=(table.betas[0], table.betas[1]), clip=table.clip or None,
    )  # fmt: skip


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise FedtriError(
            f"device: {name!r} cannot be used here: {str(error).splitlines()[0]}; use auto or cpu"
        ) from None
    return device
