"""What each method sends per client and round, from a model's configuration alone: no weights, no data, no training.

Plans and layouts are those of a run. The bytes are those of the numbers alone, without framing.
"""

import csv
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from fedtri.communication.codec import GRADIENT
from fedtri.communication.numbers import NUMBERS
from fedtri.config import validated
from fedtri.errors import FedtriError
from fedtri.methods import METHODS, build
from fedtri.runs.spec import Spec, skeleton, spec_of
from fedtri.tasks import build as build_task

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Cost:
    """A method's traffic: numbers and bytes of one client in one round, on average; the bytes that one client sends and
    receives once for a basis from gradients; the bytes of the whole run, all clients and both ways."""

    method: str
    up: float
    down: float
    up_bytes: float
    down_bytes: float
    once_bytes: int
    total_bytes: int


def costs(
    model: str,
    *,
    task: str = "text_classification",
    rank: int = 8,
    targets: str | Sequence[str] = "auto",
    labels: int | None = None,
    clients: int = 1,
    rounds: int = 2,
    dtype: str = "float32",
) -> list[Cost]:
    """Every method's cost with its default options, the highest first.

    Left out are the sketch that CE-LoRA sends once, what a client is sent that joins late, methods that move the data,
    and methods whose number of heads does not divide the rank.

    Args:
        model: A model folder, a config.json, or a name as in a configuration.
        task: The task, which says what the head is.
        rank: The adapter's rank.
        targets: The layers to adapt, as in a configuration.
        labels: The number of classes; None: as the model's configuration says.
        clients: How many clients take part in a round.
        rounds: How many rounds the run has. What comes down in a round is what the round before changed.
        dtype: The number type on the wire.

    Raises:
        FedtriError: For a model, target or number type that is not known.
    """
    if dtype not in NUMBERS:
        raise FedtriError(f"--dtype: expected one of {', '.join(NUMBERS)}, got {dtype!r}")
    names = [str(number) for number in range(labels or 0)]
    chosen = targets if isinstance(targets, str) else list(targets)
    plain = skeleton(model, build_task(task), labels)
    found = []
    for name, method in ((name, build(name)) for name in METHODS):
        if method.plan(0).pooled or rank % method.adapter.heads:
            continue
        given = {"model": model, "task": task, "method": name, "rank": rank, "targets": chosen}
        spec = spec_of(validated(given | {"wire": {"dtype": dtype}}), ["client"], names, plain)
        ways = zip(*(_travelling(spec, round) for round in range(rounds)), strict=True)
        up, down = ([math.prod(shape) for one in way for shape in one] for way in ways)
        up_bytes, down_bytes = (sum(map(NUMBERS[dtype].size, counts)) for counts in (up, down))
        once = sum(map(NUMBERS[dtype].size, _once(spec)))
        found.append(Cost(
            name, sum(up) / rounds, sum(down) / rounds, up_bytes / rounds, down_bytes / rounds, once,
            (up_bytes + down_bytes + once) * clients,
        ))  # fmt: skip
    return sorted(found, key=lambda cost: -cost.up - cost.down)


def _once(spec: Spec) -> list[int]:
    """The sizes of the tensors that travel before the first round: the client's gradient up, the basis down."""
    parts = spec.method.adapter
    if parts.basis != "gradient":
        return []
    own, few = (spec.layout.shapes(min(spec.largest_rank, most)) for most in (spec.largest_rank, spec.gradient_factors))
    up = [few[key] for key in spec.layout.keys(GRADIENT)]
    return [math.prod(shape) for shape in [*up, *(own[key] for key in spec.layout.keys(parts.basis_factors))]]


def _travelling(spec: Spec, round: int) -> tuple[list[Shape], list[Shape]]:
    """The shapes of the tensors that go up and that come down in a round."""
    plan, shapes = spec.method.plan(round), spec.layout.shapes(spec.largest_rank)
    up, down = ([shapes[key] for key in spec.layout.keys(kinds)] for kinds in (plan.up, plan.down & (plan.up | {"W"})))
    return up, down


def write(path: Path, found: Sequence[Cost]) -> None:
    """Write the table as JSON or CSV, as the file's ending says. Raises FedtriError for another ending."""
    if path.suffix not in (".json", ".csv"):
        raise FedtriError(f"--out: expected a name ending in .json or .csv, got {path}")
    rows = [asdict(cost) for cost in found]
    if path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1) + "\n")
        return
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
