"""What each method sends per client and round, from a model's configuration alone: no weights, no data, no training.

The numbers are those of the plans and layouts that runs use; a tensor counts with its entries, framing is left out.
"""

import csv
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig

from fedtri.adapters.layout import Layout
from fedtri.adapters.model import install
from fedtri.communication.codec import DTYPES
from fedtri.errors import FedtriError
from fedtri.method import Method
from fedtri.methods import METHODS, build
from fedtri.models.loading import find_targets, locate
from fedtri.tasks import Recipe
from fedtri.tasks import build as choose_task


@dataclass(frozen=True)
class Cost:
    """A method's traffic: numbers and bytes of one client in one round on average, and of the whole run."""

    method: str
    up: float
    down: float
    up_bytes: float
    down_bytes: float
    total_bytes: float


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
    """Every method's cost with its defaults, the dearest first. One round down is what the round before changed.

    `model` is a model folder, a config.json, or a name as in a run's configuration. CE-LoRA's sketch, sent once, and
    a late client's first downlink are not in it; centralized, which moves the data, is left out, and so is a method
    whose heads do not divide the rank. Raises FedtriError for a model, target or number type that is not known.
    """
    if dtype not in DTYPES:
        raise FedtriError(f"--dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
    recipe = choose_task(task)
    plain = skeleton(model, recipe, labels)
    adapted = install(plain, targets=find_targets(plain, targets), head=recipe.head(plain), rank=rank).layout
    plain = skeleton(model, recipe, labels)
    whole = install(plain, targets=[], head=recipe.head(plain), rank=1, extra="P").layout
    found = []
    for method in map(build, METHODS):
        if method.plan(0).pooled or rank % method.adapter.heads:
            continue
        layout = (
            whole
            if "P" in method.adapter.extra
            else replace(adapted, extra=method.adapter.extra, heads=method.adapter.heads)
        )
        up, down = (sum(counts) / rounds for counts in zip(*_rounds(method, layout, rank, rounds), strict=True))
        width = DTYPES[dtype][1].itemsize
        total = (up + down) * width * clients * rounds
        found.append(Cost(method.name, up, down, up * width, down * width, total))
    return sorted(found, key=lambda cost: -cost.up - cost.down)


def _rounds(method: Method, layout: Layout, rank: int, rounds: int) -> list[tuple[int, int]]:
    """(numbers up, numbers down) of each round."""
    shapes = layout.shapes(rank)

    def numbers(kinds: frozenset[str]) -> int:
        return sum(torch.Size(shapes[key]).numel() for key in layout.keys(kinds))

    plans = [method.plan(round) for round in range(rounds)]
    return [(numbers(plan.up), numbers(plan.down & (plan.up | {"W"}))) for plan in plans]


def skeleton(model: str, recipe: Recipe, labels: int | None = None) -> nn.Module:
    """The task's model on the meta device: shapes without numbers. Raises FedtriError where there is none."""
    path = Path(model).expanduser()
    try:
        shape = AutoConfig.from_pretrained(str(path) if path.is_file() else locate(model))
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise FedtriError(f"model: {model} has no configuration: {reason}; expected a folder or hub name") from None
    if labels is not None:
        shape.num_labels = labels
    with torch.device("meta"):
        return recipe.skeleton(shape)


def write(path: Path, found: Sequence[Cost]) -> None:
    """The table as JSON or CSV, by the file's ending. Raises FedtriError for another one."""
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
