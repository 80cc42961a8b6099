"""A comparison's footing: what is equal for all methods, and the learning rate that suits each.

Equal rank leaves the ranks as they are and refuses others. Equal parameters or bytes gives each method the rank whose
trained numbers, or bytes up in a round, come nearest to the baseline's; heads that stay at home are not counted.

Tuning runs each method at the same few multiples of its own learning rates, for the same few rounds on the same seed,
and takes the multiple with the smallest mean validation loss. No test example is used for it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from fedtri.config import Config
from fedtri.errors import FedtriError
from fedtri.runs.shapes import skeleton
from fedtri.runs.simulation import deal
from fedtri.runs.spec import Spec, method_of, spec_of, task_of

Footing = Literal["rank", "parameters", "bytes"]
FACTORS = (0.3, 1.0, 3.0)
"""The multiples of a method's own learning rates that tuning tries."""


def read(text: str) -> Footing:
    """The footing of this name. Raises FedtriError for another."""
    for name in get_args(Footing):
        if name == text:
            return name
    raise FedtriError(f"--equal: expected one of {', '.join(get_args(Footing))}, got {text!r}")


@dataclass
class Specs:
    """Specs of configurations that share their data, which are dealt once."""

    dealt: dict[str, tuple[list[str], list[str]]] = field(default_factory=dict)

    def of(self, config: Config) -> Spec:
        """The Spec of one configuration. Raises FedtriError for settings that do not go together, before any run."""
        place = repr((config.data, config.task, config.task_options, config.columns, config.partition, config.clients,
                      config.data_options, config.split))  # fmt: skip
        if place not in self.dealt:
            pool, splits = deal(config)
            self.dealt[place] = list(splits), list(pool.label_names)
        clients, labels = self.dealt[place]
        plain = skeleton(config.model, task_of(config), len(labels) or None)
        return spec_of(config, clients, labels, plain)


def size(spec: Spec, of: Footing) -> int:
    """How much a client trains (numbers), or sends in a round (bytes), without a head that stays at home."""
    client, plan = spec.clients[0], spec.method.plan(0)
    if of == "bytes":
        return spec.payload_bytes(client)
    shapes = spec.layout.shapes(spec.scales.ranks[client])
    return sum(math.prod(shapes[key]) for key in spec.layout.keys(plan.train - ({"H"} - plan.up)))


def equal(configs: Sequence[Config], baseline: Config, of: Footing, specs: Specs) -> list[Config]:
    """The configurations on this footing.

    Args:
        configs: One for each method, and grid point.
        baseline: The one that the others are made equal to.
        of: What is to be equal.
        specs: Checks them.

    Raises:
        FedtriError: For ranks that differ where these are to be equal, or that differ between clients.
    """
    if of == "rank":
        for config in configs:
            if config.rank != baseline.rank:
                raise FedtriError(
                    f"--equal rank: {config.method} has rank {config.rank}, {baseline.method} has {baseline.rank}; "
                    "give all methods one rank, or choose --equal parameters or bytes"
                )
        return list(configs)
    target = size(specs.of(baseline), of)
    if not target:
        raise FedtriError(f"--equal {of}: {baseline.method} has none; choose another --baseline")
    return [_sized(config, target, of, specs) for config in configs]


def _sized(config: Config, target: int, of: Footing, specs: Specs) -> Config:
    """The configuration with the rank that comes nearest to the target; as it is where no rank changes anything."""

    def at(rank: int) -> int | None:
        try:
            return size(specs.of(config.model_copy(update={"rank": rank})), of)
        except FedtriError:  # a rank that the method, or the smallest layer, cannot have
            return None

    spec = specs.of(config)
    if not spec.layout.layers or not size(spec, of):
        return config
    step = spec.layout.heads
    ranks = range(step, min(min(layer.d_in, layer.d_out) for layer in spec.layout.layers) + 1, step)
    low, high = 0, len(ranks) - 1
    while low < high:  # what is sent grows with the rank
        middle = (low + high) // 2
        found = at(ranks[middle])
        low, high = (middle + 1, high) if found is not None and found < target else (low, middle)
    near = {rank: found for rank in ranks[max(low - 1, 0) : low + 1] if (found := at(rank)) is not None}
    best = min(near, key=lambda rank: abs(math.log(near[rank] / target)), default=config.rank)
    return config.model_copy(update={"rank": best})


def at_rate(config: Config, factor: float) -> Config:
    """The configuration with all of its method's learning rates times this factor."""
    own = {**method_of(config).adapter.learning_rates, **config.optimizer.learning_rates}
    rates: dict[str, Any] = {letter: _rounded(rate * factor) for letter, rate in own.items()}
    optimizer = config.optimizer.model_copy(update={"learning_rates": rates})
    return config.model_copy(update={"learning_rate": _rounded(config.learning_rate * factor), "optimizer": optimizer})


def trial(config: Config, factor: float, rounds: int) -> Config:
    """A short run at a multiple of the learning rates, in which clients report their validation loss.

    Raises FedtriError where there are no validation examples.
    """
    if config.split.validation == 0:
        raise FedtriError("--tune: needs validation examples; set split.validation above 0")
    patience = config.early_stopping.model_copy(update={"patience": rounds})  # it never stops, but losses are told
    update = {"rounds": rounds, "evaluate": False, "early_stopping": patience}
    return at_rate(config, factor).model_copy(update=update)


def best(losses: dict[float, float]) -> float:
    """The factor with the smallest loss; of none that is finite, 1."""
    known = {factor: loss for factor, loss in losses.items() if math.isfinite(loss)}
    return min(known, key=lambda factor: known[factor], default=1.0)


def _rounded(rate: float) -> float:
    """Three digits, so that a rate reads well in a table."""
    return float(f"{rate:.3g}")
