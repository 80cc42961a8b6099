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
from fedtri.communication.compression import FLOAT32, Types
from fedtri.communication.numbers import NUMBERS, PLAIN
from fedtri.config import validated
from fedtri.errors import FedtriError
from fedtri.methods import METHODS, build
from fedtri.runs.shapes import skeleton
from fedtri.runs.spec import Spec, spec_of
from fedtri.tasks import build as build_task


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
    wire: Types = FLOAT32,
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
        wire: The number types on the wire.

    Raises:
        FedtriError: For a model, target or number type that is not known.
    """
    for option, name in asdict(wire).items():
        if name not in (known := [one.name for one in PLAIN]):
            raise FedtriError(f"--{option}: expected one of {', '.join(known)}, got {name!r}")
    names = [str(number) for number in range(labels or 0)]
    chosen = targets if isinstance(targets, str) else list(targets)
    plain = skeleton(model, build_task(task), labels)
    found = []
    for name, method in ((name, build(name)) for name in METHODS):
        if method.plan(0).pooled or rank % method.adapter.heads:
            continue
        given = {"model": model, "task": task, "method": name, "rank": rank, "targets": chosen}
        spec = spec_of(validated(given | {"wire": asdict(wire)}), ["client"], names, plain)
        (up, up_bytes), (down, down_bytes) = _sent(spec, rounds)
        once = sum(map(NUMBERS[spec.wire.basis].size, _once(spec)))
        found.append(Cost(
            name, up / rounds, down / rounds, up_bytes / rounds, down_bytes / rounds, once,
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
    return [math.prod(shape) for shape in [*up, *(own[key] for key in spec.layout.keys(parts.from_basis))]]


def _sent(spec: Spec, rounds: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """(numbers, bytes) that go up and that come down for a client that takes part in every round."""
    plan, codec, shapes = spec.method.plan, spec.codec, spec.layout.shapes(spec.largest_rank)
    known = set(codec.traffic.follows(codec.start(spec.clients[0])))
    totals = {"up": (0, 0), "down": (0, 0)}
    for round in range(rounds):
        now = plan(round)
        for way, kinds, moving in (("up", now.up, spec.wire.up), ("down", now.down & (now.up | {"W"}), spec.wire.down)):
            keys = spec.layout.keys(kinds)
            ways = codec.traffic.ways(keys, moving, known)
            counts = {key: math.prod(shapes[key]) for key in keys}
            size = sum(NUMBERS[ways[key].numbers].size(count) for key, count in counts.items())
            totals[way] = (totals[way][0] + sum(counts.values()), totals[way][1] + size)
        known |= set(spec.layout.keys(now.down & (now.up | {"W"})))
    return totals["up"], totals["down"]


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
