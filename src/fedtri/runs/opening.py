"""From a Spec to a model that is loaded and adapted, and to the site of the clients whose data are at hand.

A simulated federation and a real site are opened by the same functions: a real site is a site of one client.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor, nn

from fedtri.adapters.initial import initial_factors
from fedtri.adapters.layer import weight_of
from fedtri.adapters.layout import Key
from fedtri.adapters.model import AdaptedModel, install, of_classes
from fedtri.config import Config
from fedtri.config.schema import Simulation
from fedtri.data.partition import Split
from fedtri.errors import FedtriError
from fedtri.execution import build as executors
from fedtri.execution.executor import Executor, OnStep
from fedtri.execution.fast.kept import Keeping
from fedtri.federation.client import Site
from fedtri.messages import POOLED
from fedtri.models import loading
from fedtri.models.peft import read_peft
from fedtri.runs.shapes import layout_of
from fedtri.runs.spec import Spec
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
    """A model with adapters in it, and what belongs to it."""

    adapted: AdaptedModel
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


def open_model(spec: Spec, machine: Machine) -> Opened:
    """The model, loaded and adapted.

    Raises FedtriError where it cannot be loaded, or is another model than the Spec was built from.
    """
    device, how, parts = _device(machine.device), spec.model_options, spec.method.adapter
    weights = loading.Weights(how.dtype, how.quantization, str(device))
    loaded = spec.recipe.load(machine.model, spec.labels, weights)
    model, layers = loaded.model, spec.recipe.head(loaded.model)
    _require_layout(spec, machine, model)
    head = loading.initial_head(model, layers, loaded.fresh, spec.seed)
    adapted = install(
        model if how.quantization != "none" else model.to(device),
        targets=spec.targets,
        head=layers,
        rank=spec.largest_rank,
        kind=spec.kind,
        extra=parts.extra,
        heads=parts.heads,
        mixed_precision=how.mixed_precision == "bfloat16",
    )
    return Opened(adapted, loaded.processor, {**head, **adapted.initial})


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
    parts = spec.method.adapter
    factors = initial_factors(
        spec.layout, opened.given, rank=rank, seed=spec.seed, basis=parts.basis, core=parts.core,
        weight=lambda name: _plain_weight(opened.adapted, name),
    )  # fmt: skip
    if spec.init_adapter is not None:
        if parts.core or parts.basis != "kaiming":
            raise FedtriError("init_adapter: A and B come from a basis in this run; leave init_adapter out")
        factors |= read_peft(spec.init_adapter, spec.layout, rank, spec.scales.alpha)
    return factors


def _plain_weight(adapted: AdaptedModel, name: str) -> Tensor:
    if adapted.quantised:
        raise FedtriError('basis: "weights" needs plain weights; set model_options.quantization to none')
    return weight_of(adapted.layer(name).base).cpu()


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
        initial=lambda client: of_classes(spec.layout, first[ranks[client]], data.classes.get(client)),
        fresh=_fresh(spec),
        store=store,
        seed=spec.seed,
        labels=data.examples.labels,
        label_count=spec.sketch.classes,
        sketch_dims=spec.sketch.features if spec.sketch.half else 0,
        classes=data.classes,
        basis_examples=spec.basis_examples,
        gradient_factors=spec.gradient_factors,
        evaluate=spec.schedule.evaluate,
        fits_heads=spec.fits_heads,
        validate=spec.validates,
        on_step=on_step,
    )


def _executor(spec: Spec, machine: Machine, opened: Opened, data: Data, folder: Path) -> Executor:
    """What trains and scores the clients; what it keeps on disk lies in `folder`."""
    return executors.build(
        opened.adapted,
        spec.recipe.learning(list(spec.labels), opened.processor),
        data.examples,
        name=machine.simulation.executor,
        group=machine.simulation.group,
        token_budget=machine.simulation.token_budget,
        gradient_checkpointing=spec.model_options.gradient_checkpointing,
        keeping=_keeping(spec, machine, data, folder),
    )


def _keeping(spec: Spec, machine: Machine, data: Data, folder: Path) -> Keeping | None:
    """The examples that a run meets more than once: what enters the first adapted layer may be kept for them."""
    options, how, schedule = machine.simulation, spec.optimization, spec.schedule
    if options.prefix_budget == 0:
        return None
    kept: list[np.ndarray] = []
    for client in sorted(set(data.splits) - {POOLED}):
        split = data.splits[client]
        drawn = len(split.train) * how.epochs if how.epochs else (how.steps or 0) * how.batch_size
        again = schedule.rounds * schedule.fraction * drawn > len(split.train)
        scored = [split.test, split.validation] if schedule.evaluate and schedule.rounds > 1 else []
        kept += [rows for rows in [*([split.train] if again else []), *scored] if len(rows)]
    dtype = None if options.prefix_dtype == "auto" else getattr(torch, options.prefix_dtype)
    return Keeping(kept, budget=options.prefix_budget << 20, folder=folder, dtype=dtype)


def _fresh(spec: Spec) -> Callable[[str, int], dict[Key, Tensor]]:
    """A new draw of a client's A, C and B for a round: each client has its own."""
    parts = spec.method.adapter

    def draw(client: str, round: int) -> dict[Key, Tensor]:
        rank = spec.scales.ranks[client]
        seed = derive(spec.seed, "fresh", round, client)
        return initial_factors(spec.layout, {}, rank=rank, seed=seed, basis=parts.basis, core=parts.core)

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
