"""From a Spec to a model that is loaded and adapted, and to the site of the clients whose data are at hand.

A simulated federation and a real site are opened by the same functions: a real site is a site of one client.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor, nn

from fedtri.adapters.bank import Cohort
from fedtri.adapters.initial import initial_factors
from fedtri.adapters.layout import Key
from fedtri.config import Config
from fedtri.config.schema import Simulation
from fedtri.data.partition import Split
from fedtri.errors import FedtriError
from fedtri.execution.executor import Executor, OnStep
from fedtri.execution.interim import InterimExecutor
from fedtri.execution.train import micro_batches
from fedtri.federation.client import Site
from fedtri.messages import POOLED
from fedtri.models import loading
from fedtri.models.peft import read_peft
from fedtri.runs.spec import Spec, layout_of
from fedtri.seeds import derive
from fedtri.storage.client_store import ClientStore
from fedtri.tasks import Examples


@dataclass(frozen=True)
class Machine:
    """What one machine decides for itself: where its copy of the model is, on what it computes, and how."""

    model: str
    device: str
    simulation: Simulation

    @staticmethod
    def of(config: Config) -> "Machine":
        """As this machine's configuration says."""
        return Machine(config.model, config.device, config.simulation)


@dataclass(frozen=True)
class Opened:
    """A model with room for clients' tensors."""

    adapted: Cohort
    processor: Any
    """What turns examples into the model's inputs."""
    given: Mapping[Key, Tensor]
    """What every client starts with because the model says so: its head, DoRA's magnitudes, a backbone that learns."""


@dataclass(frozen=True)
class Data:
    """The examples of one place, and which of them each client has."""

    examples: Examples
    splits: Mapping[str, Split]
    classes: Mapping[str, Int[np.ndarray, "own"]] = field(default_factory=dict)
    """The classes of each client's own head; empty where all have all."""


def open_model(spec: Spec, machine: Machine, clients: int = 1) -> Opened:
    """The model, loaded and adapted, with room for so many clients at once.

    Raises FedtriError where it cannot be loaded, or is another model than the Spec was built from.
    """
    device, how, parts = _device(machine.device), spec.model_options, spec.method.adapter
    weights = loading.Weights(how.dtype, how.quantization, str(device))
    loaded = spec.recipe.load(machine.model, spec.labels, weights)
    model, layers = loaded.model, spec.recipe.head(loaded.model)
    _require_layout(spec, machine, model)
    head = loading.initial_head(model, layers, loaded.fresh, spec.seed)
    adapted = Cohort(
        model if how.quantization != "none" else model.to(device),
        targets=spec.targets,
        head=layers,
        clients=1 if spec.layout.backbone else clients,
        rank=spec.largest_rank,
        kind=spec.kind,
        extra=parts.extra,
        heads=parts.heads,
        checkpointing=how.gradient_checkpointing,
        mixed_precision=how.mixed_precision == "bfloat16",
    )
    return Opened(adapted, loaded.processor, {**head, **adapted.initial()})


def _require_layout(spec: Spec, machine: Machine, model: nn.Module) -> None:
    try:
        found = layout_of(model, spec.recipe, spec.method, spec.largest_rank, spec.targets, kind=spec.kind)
    except FedtriError:
        found = None
    if found != spec.layout:
        raise FedtriError(
            f"model: {machine.model} is another model than the federation's, or its weights do not have the shapes "
            "that its config.json says; give every end the same model"
        )


def initial(spec: Spec, opened: Opened, rank: int) -> dict[Key, Tensor]:
    """What a client of this rank starts from: the seed's factors, or those of the PEFT adapter that is given."""
    basis = spec.method.adapter.basis
    factors = initial_factors(spec.layout, opened.given, rank=rank, seed=spec.seed, basis=basis)
    if spec.init_adapter is not None:
        if basis != "kaiming":
            raise FedtriError("init_adapter: this method freezes A and B in a basis of its own; leave init_adapter out")
        factors |= read_peft(spec.init_adapter, spec.layout, rank, spec.scales.alpha)
    return factors


def open_site(
    spec: Spec,
    machine: Machine,
    opened: Opened,
    data: Data,
    store: ClientStore,
    on_step: OnStep = lambda client, step, loss: None,
) -> Site:
    """The client side of a federation, of all clients whose data are here.

    Raises FedtriError where early stopping has no validation examples to go by.
    """
    if spec.validates and not any(len(split.validation) for split in data.splits.values()):
        raise FedtriError("early_stopping.patience: needs validation examples, and there are none; "
                          "set split.validation higher")  # fmt: skip
    ranks = {client: spec.scales.ranks[client] for client in data.splits}
    first = {rank: initial(spec, opened, rank) for rank in set(ranks.values())}
    return Site(
        executor=_executor(spec, machine, opened, data, store.folder),
        method=spec.method,
        splits=data.splits,
        scales=spec.scales,
        optimization=spec.optimization,
        initial=lambda client: opened.adapted.of_classes(first[ranks[client]], data.classes.get(client)),
        fresh=_fresh(spec),
        store=store,
        seed=spec.seed,
        labels=data.examples.labels,
        label_count=spec.sketch.classes,
        classes=data.classes,
        evaluate=spec.schedule.evaluate,
        validate=spec.validates,
        on_step=on_step,
    )


def _executor(spec: Spec, machine: Machine, opened: Opened, data: Data, folder: Path) -> Executor:
    """What trains and scores the clients; what it keeps on disk lies in `folder`."""
    task = spec.recipe.learning(list(spec.labels), opened.processor)
    _keep_prefix(spec, machine, opened.adapted, data, folder)
    return InterimExecutor(opened.adapted, task, data.examples, machine.simulation.token_budget)


def _keep_prefix(spec: Spec, machine: Machine, adapted: Cohort, data: Data, folder: Path) -> None:
    """Let what enters the first adapted layer be kept for the examples that a run meets more than once."""
    options, how, schedule = machine.simulation, spec.optimization, spec.schedule
    if adapted.prefix is None or options.prefix_budget == 0:
        return

    def groups() -> Iterator[np.ndarray]:
        for client in sorted(set(data.splits) - {POOLED}):
            split = data.splits[client]
            drawn = len(split.train) * how.epochs if how.epochs else (how.steps or 0) * how.batch_size
            again = schedule.rounds * schedule.fraction * drawn > len(split.train)
            scored = [split.test, split.validation] if schedule.evaluate and schedule.rounds > 1 else []
            for rows in [*([split.train] if again else []), *scored]:
                if len(rows):
                    budget, packed = options.token_budget, adapted.packing is not None
                    yield from (rows[run] for run in micro_batches(data.examples.lengths[rows], budget, packed=packed))

    dtype = options.prefix_dtype
    adapted.prefix.keep(
        data.examples, groups(), budget=options.prefix_budget << 20, folder=folder,
        dtype=None if dtype == "auto" else getattr(torch, dtype),
    )  # fmt: skip


def _fresh(spec: Spec) -> Callable[[str, int], dict[Key, Tensor]]:
    """A new draw of a client's A, C and B for a round, the same for all clients of one rank."""

    def draw(client: str, round: int) -> dict[Key, Tensor]:
        rank = spec.scales.ranks[client]
        return initial_factors(spec.layout, {}, rank=rank, seed=derive(spec.seed, "fresh", round))

    return draw


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
