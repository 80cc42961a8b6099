"""From a configuration to a federation that can run: model, data, method, clients and transport."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from fedtri import adapter, methods, models
from fedtri.client import Site
from fedtri.config import Config
from fedtri.data import Pool, load_pool
from fedtri.data.partition import Split, partition
from fedtri.engine import Schedule
from fedtri.errors import FedtriError
from fedtri.export import read_peft
from fedtri.server import Expectation
from fedtri.store import ClientStore
from fedtri.tasks import text_classification as text
from fedtri.train import Optimization
from fedtri.transport.local import LocalTransport
from fedtri.types import Key, Method


@dataclass(frozen=True)
class Federation:
    """Everything `engine.run` takes, and what reading its results needs."""

    config: Config
    method: Method
    site: Site
    transport: LocalTransport
    expected: Expectation
    schedule: Schedule
    tokenizer: PreTrainedTokenizerBase
    label_names: tuple[str, ...]

    def describe_clients(self) -> dict[str, dict[str, object]]:
        """Each client's sizes, its counts of each class, and what guessing its largest training class would score."""
        table = {}
        labels = self.site.examples.labels
        assert labels is not None
        for client, split in self.site.splits.items():
            counts = np.bincount(labels[split.train], minlength=len(self.label_names))
            table[client] = {
                "train": len(split.train),
                "validation": len(split.validation),
                "test": len(split.test),
                "labels": counts.tolist(),
                "guess": float((labels[split.test] == counts.argmax()).mean()),
            }
        return table


def build(config: Config, store: ClientStore) -> Federation:
    """The federation a config describes, its clients' tensors kept in `store`. Raises FedtriError on bad input."""
    method = methods.build(config.method, config.method_options, config.head)
    pool = load_pool(
        config.data, text_columns=config.text_columns, label_column=config.label_column,
        limit=config.data_options.limit, seed=config.seed,
    )  # fmt: skip
    shares = (config.split.train, config.split.validation, config.split.test)
    splits = partition(pool, spec=config.partition, clients=config.clients, seed=config.seed, fractions=shares)
    cohort, tokenizer, head = load_cohort(
        config, pool.label_names, min(len(splits), config.simulation.cohort or len(splits))
    )
    return assemble(config, method, pool, splits, cohort, tokenizer, head, store)


def load_cohort(
    config: Config, label_names: tuple[str, ...], clients: int
) -> tuple[adapter.Cohort, PreTrainedTokenizerBase, Mapping[Key, Tensor]]:
    """The model with room for `clients` clients' factors, its tokenizer, and the head everyone starts from."""
    model, tokenizer, fresh = text.load(config.model, label_names)
    head = models.initial_head(model, fresh, config.seed)
    cohort = adapter.Cohort(
        model.to(_device(config.device)),
        targets=models.find_targets(model, config.targets),
        head=models.head_layers(model),
        clients=clients,
        rank=config.rank,
    )
    return cohort, tokenizer, head


def start(config: Config, cohort: adapter.Cohort, head: Mapping[Key, Tensor], basis: str) -> dict[Key, Tensor]:
    """What every client starts from: the seed's factors, or an existing PEFT adapter's A and B with C = I."""
    factors = adapter.initial_factors(cohort.layout, head, rank=config.rank, seed=config.seed, basis=basis)
    if config.init_adapter is not None:
        if basis != "kaiming":
            raise FedtriError("init_adapter: this method freezes A and B in a basis of its own; leave init_adapter out")
        factors |= read_peft(config.init_adapter, cohort.layout, config.rank, config.lora_alpha)
    return factors


def assemble(
    config: Config,
    method: Method,
    pool: Pool,
    splits: Mapping[str, Split],
    cohort: adapter.Cohort,
    tokenizer: PreTrainedTokenizerBase,
    head: Mapping[Key, Tensor],
    store: ClientStore,
) -> Federation:
    """The federation over data, splits and a model that are already at hand."""
    columns = pool.table.column_names
    labels = np.asarray(pool.table["label"])
    pairs = pool.table["text_pair"] if "text_pair" in columns else None
    first = start(config, cohort, head, method.basis)
    site = Site(
        cohort=cohort,
        task=text.TextClassification(len(pool.label_names)),
        examples=text.tokenize(tokenizer, pool.table["text"], pairs, labels, config.max_length),
        splits=splits,
        ranks=dict.fromkeys(splits, config.rank),
        alpha=config.lora_alpha,
        method=method,
        optimization=optimization(config),
        initial=lambda client: first,
        store=store,
        seed=config.seed,
        evaluate=config.evaluate,
        validate=config.early_stopping.patience is not None,
        token_budget=config.simulation.token_budget,
    )
    if site.validate and not any(len(split.validation) for split in splits.values()):
        raise FedtriError("early_stopping.patience: needs validation examples; set split.validation above 0")
    return Federation(
        config=config,
        method=method,
        site=site,
        transport=LocalTransport(site, config.wire.dtype),
        expected=Expectation(cohort.layout, site.ranks, config.wire.norm_bound),
        schedule=Schedule(config.rounds, config.fraction, config.seed, config.evaluate, config.early_stopping.patience),
        tokenizer=tokenizer,
        label_names=pool.label_names,
    )


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
        raise FedtriError(f"device: {name!r} cannot be used here: {str(error).splitlines()[0]}") from None
    return device
