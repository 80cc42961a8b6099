"""The Spec: everything that both ends of a federation derive from its configuration, built by one function.

The simulator, a site, the server, `fedtri deploy check`, `fedtri cost` and finished models all start from a Spec. So
two ends that have the same configuration cannot disagree. No weights are loaded for it: shapes come from the model's
configuration alone.
"""

import functools
import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from torch import nn

from fedtri import methods, tasks
from fedtri.adapters.initial import derived_factors
from fedtri.adapters.layer import Kind
from fedtri.adapters.layout import FACTORS, Layout
from fedtri.aggregation import server_optimizers
from fedtri.communication.codec import Codec, SketchSize
from fedtri.communication.compression import Types
from fedtri.communication.numbers import MIXED, NUMBERS
from fedtri.config import Config
from fedtri.config.schema import ModelOptions, Wire
from fedtri.errors import FedtriError
from fedtri.execution.executor import Optimization
from fedtri.federation.loop import Schedule
from fedtri.federation.server import Expectation, sample
from fedtri.messages import POOLED
from fedtri.method import Method
from fedtri.runs.shapes import layout_of, skeleton
from fedtri.seeds import derive
from fedtri.state import Scales
from fedtri.tasks import Recipe

OWN = frozenset({
    "model", "data", "device", "out", "clients", "partition", "data_options", "simulation", "columns", "transport",
})  # fmt: skip
"""Keys of one machine: its paths and hardware, and what exists in simulation alone. They may differ between the ends,
and change nothing in the Spec but what they describe (the shapes of another model, the clients of a partition)."""
RESUMABLE = frozenset({"rounds"})
"""Keys that both ends share, but that may be raised before a run is resumed: they are not part of the fingerprint."""


@dataclass(frozen=True)
class Spec:
    """What both ends of a federation derive from its configuration."""

    clients: tuple[str, ...]
    """Their names, sorted."""
    labels: tuple[str, ...]
    """The names of the classes in the order of their ids; empty where there are none."""
    layout: Layout
    """Which tensors a client has."""
    scales: Scales
    """Alpha, and each client's rank."""
    kind: Kind
    """The kind of adapter: lora, dora or hira."""
    model_options: ModelOptions
    optimization: Optimization
    schedule: Schedule
    wire: Wire
    sketch: SketchSize
    max_length: int
    shares: tuple[float, float, float]
    """What part of a client's examples is for training, validation and test."""
    seed: int
    own_classes: bool
    """Whether each client's head has the classes of its own examples alone."""
    fits_heads: bool
    """Whether a client's head starts as its own examples fit it."""
    init_adapter: str | None
    """A PEFT adapter to start from."""
    basis_examples: int
    """From how many training examples a client computes its gradient for a basis, at most."""
    gradient_factors: int
    """How many leading factors of that gradient it sends, at most its rank."""
    fingerprint: bytes
    """8 bytes that differ where any setting differs that both ends must share."""
    method: Method = field(compare=False, repr=False)
    """Functions cannot be compared; the fingerprint covers the method's name and options, and the task's."""
    recipe: Recipe = field(compare=False, repr=False)

    @property
    def validates(self) -> bool:
        """Whether clients report the loss on their validation split: early stopping needs it."""
        return self.schedule.patience is not None

    @property
    def targets(self) -> list[str]:
        """The names of the layers that are adapted."""
        return [layer.name for layer in self.layout.layers]

    @property
    def largest_rank(self) -> int:
        """The largest rank of a client."""
        return max(self.scales.ranks.values())

    @property
    def codec(self) -> Codec:
        """How this federation's messages become bytes."""
        expected, wire = Expectation(self.layout, self.scales, self.wire.norm_bound, self.gradient_factors), self.wire
        once = MIXED[wire.basis].name if wire.basis in MIXED else wire.basis
        types, parts = Types(wire.up, wire.down, once), self.method.adapter
        bases = parts.from_basis if parts.basis == "gradient" else frozenset[str]()
        of_rank = functools.cache(functools.partial(
            derived_factors, self.layout, seed=self.seed, basis=parts.basis, core=parts.core,
            given=self.init_adapter is not None,
        ))  # fmt: skip
        return Codec(
            expected, self.method.plan, types, self.sketch,
            lambda client: of_rank(self.scales.ranks[client]), bases, self.fingerprint,
        )  # fmt: skip

    def payload_bytes(self, client: str) -> int:
        """The bytes of the numbers alone that this client sends in a round after the first."""
        return sum(map(NUMBERS[self.wire.up].size, self._sizes(client)))

    def payload_numbers(self, client: str) -> int:
        """How many numbers this client sends in the first round."""
        return sum(self._sizes(client))

    def _sizes(self, client: str) -> list[int]:
        shapes = self.layout.shapes(self.scales.ranks[client])
        return [math.prod(shapes[key]) for key in self.layout.keys(self.method.plan(0).up)]


def spec_of(
    config: Config,
    clients: Sequence[str],
    labels: Sequence[str],
    plain: nn.Module | None = None,
    method: Method | None = None,
) -> Spec:
    """The Spec of a configuration.

    Args:
        config: The configuration, as this machine has it.
        clients: The clients' names: on a network those of [network], in simulation those of the partition.
        labels: The names of the classes in the order of their ids, from the same place.
        plain: The model's `skeleton`, where it is at hand.
        method: A method that takes the place of the one that the configuration names.

    Raises:
        FedtriError: In one line, for any two settings that do not go together, and for a model without a configuration.
    """
    method, recipe = method_of(config, method), task_of(config)
    names = sorted(clients)
    ranks = client_ranks(config.rank, names, config.seed)
    how, patience = optimization_of(config, method), config.early_stopping.patience
    if patience is not None and config.split.validation == 0:
        raise FedtriError("early_stopping.patience: needs validation examples; set split.validation above 0")
    if method.plan(0).pooled:  # one pseudo-client does the work of all who take part
        count = len(sample(names, config.fraction, 0, config.seed))
        how = replace(how, steps=how.steps and how.steps * count)
        ranks[POOLED] = max(ranks.values())
    plain = skeleton(config.model, recipe, len(labels) or None) if plain is None else plain
    layout = layout_of(plain, recipe, method, max(ranks.values()), config.targets, config.layers, kind=config.adapter)
    if config.labels == "own":
        _require_own_heads('labels: "own"', 'labels = "shared"', recipe, method, layout)
    if config.head_start == "fit":
        _require_own_heads('head_start: "fit"', 'head_start = "initial"', recipe, method, layout)
    width = recipe.feature_size(plain) if method.welcome is not None else 0
    dims = config.similarity.sketch_dims
    return Spec(
        clients=tuple(names),
        labels=tuple(labels),
        layout=layout,
        scales=Scales(config.lora_alpha, ranks),
        kind=config.adapter,
        model_options=config.model_options,
        optimization=how,
        schedule=Schedule(
            config.rounds, config.fraction, config.seed, config.evaluate, patience,
            quorum=_quorum(config), attempts=config.network.attempts if config.network.clients else 1,
        ),
        wire=config.wire,
        sketch=SketchSize(recipe.sketch_classes(labels), min(dims or width, width), half=dims > 0),
        max_length=config.max_length,
        shares=(config.split.train, config.split.validation, config.split.test),
        seed=config.seed,
        own_classes=config.labels == "own",
        fits_heads=config.head_start == "fit",
        init_adapter=config.init_adapter,
        basis_examples=config.basis_examples,
        gradient_factors=config.basis_factors,
        fingerprint=fingerprint_of(config),
        method=method,
        recipe=recipe,
    )  # fmt: skip


def task_of(config: Config) -> Recipe:
    """The task with its options. Raises FedtriError for one that has no use for a column that is given."""
    return tasks.build(config.task, config.task_options, columns_of(config))


def columns_of(config: Config) -> dict[str, str]:
    """The columns that are given, by role."""
    return {role: name for role, name in config.columns.model_dump().items() if name is not None}


def method_of(config: Config, instead: Method | None = None) -> Method:
    """The method with its options, head, kind of adapter, weights and server optimiser.

    Args:
        config: The configuration.
        instead: A method that takes the place of the one that the configuration names.

    Raises:
        FedtriError: In one line, for whatever does not go together.
    """
    server, step = config.server, None
    if server.optimizer != "none":
        betas = (server.betas[0], server.betas[1])
        step = server_optimizers.optimizer(server.optimizer, learning_rate=server.learning_rate, betas=betas)
    if instead is None:
        instead = methods.make(config.method, config.method_options)
    method = methods.as_run(
        instead, head=config.head, adapter=config.adapter, basis=config.basis, optimizer=step, weights=config.weights
    )
    if not isinstance(config.rank, int) and not method.adapter.mixed_ranks:
        raise FedtriError(
            f"rank: {method.name} needs one rank for all clients, got {config.rank!r}; give one number, or choose of "
            f"{', '.join(name for name in methods.METHODS if methods.build(name).adapter.mixed_ranks)}"
        )
    return method


def optimization_of(config: Config, method: Method) -> Optimization:
    """How a client of this method trains in one round.

    Raises FedtriError for the learning rate of a factor that the method does not train.
    """
    table = config.optimizer
    learns = frozenset[str]().union(*(method.plan(round).train for round in range(max(2, config.rounds))))
    for factor in table.learning_rates:
        if factor not in learns:
            raise FedtriError(
                f"optimizer.learning_rates.{factor}: {method.name} does not train {factor}, expected one of "
                f"{', '.join(f for f in FACTORS if f in learns)}; leave it out"
            )
    return Optimization(
        steps=config.steps, epochs=config.epochs, batch_size=config.batch_size, learning_rate=config.learning_rate,
        schedule=table.schedule, warmup=table.warmup, weight_decay=table.weight_decay,
        betas=(table.betas[0], table.betas[1]), clip=table.clip or None,
        learning_rates={**method.adapter.learning_rates, **table.learning_rates},
    )  # fmt: skip


def client_ranks(rank: int | list[int] | str, clients: Sequence[str], seed: int) -> dict[str, int]:
    """Every client's rank: one for all, one for each in the order of their names, or "uniform:LOW,HIGH".

    "uniform" draws an integer from LOW to HIGH, both included and equally likely, from the run's seed and the client's
    name. Raises FedtriError where the list is not as long as there are clients, or LOW is above HIGH.
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


def fingerprint_of(config: Config) -> bytes:
    """8 bytes that differ where any setting differs that both ends must share."""
    table = config.model_dump(exclude=set(OWN | RESUMABLE))
    table["network"] = {"labels": config.network.labels}
    return hashlib.blake2b(json.dumps(table, sort_keys=True).encode(), digest_size=8).digest()


def _quorum(config: Config) -> int:
    """The replies that a round needs: on a network, as many as `minimum` says of those who are asked."""
    network = config.network
    return max(1, min(network.minimum, round(config.fraction * len(network.clients)))) if network.clients else 1


def _require_own_heads(setting: str, instead: str, recipe: Recipe, method: Method, layout: Layout) -> None:
    """Raises FedtriError where clients' heads cannot differ, because they travel or there are none."""
    if not layout.head or (setting.startswith("labels") and not recipe.classifies):
        raise FedtriError(f"{setting} needs a head with a row for each class, which task {recipe.name} has not; "
                          f"set {instead}")  # fmt: skip
    if method.plan(0).pooled or any("H" in method.plan(round).up | method.plan(round).down for round in range(2)):
        raise FedtriError(f"{setting} needs heads that stay at home, and {method.name} has one head for all; "
                          'set head = "personal", or choose another method')  # fmt: skip
