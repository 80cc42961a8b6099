"""Commands that answer before anything runs: methods, cost."""

from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.table import Table

from fedtri.cli.shared import prepare, say, wide


def methods() -> None:
    """List the methods: what learns, what travels, and where each is from."""
    from fedtri.adapters.layout import FACTORS
    from fedtri.methods import METHODS, build, scope

    table = Table("method", "learns", "up", "down", "factors", "mixed ranks", "source", box=box.SIMPLE_HEAD)
    for name in METHODS:
        method = build(name)
        plans = [method.plan(round) for round in (0, 1)]
        travels = (
            " / ".join(dict.fromkeys(" ".join(f for f in FACTORS if f in kinds) or "–" for kinds in rounds))
            for rounds in zip(*((plan.train, plan.up, plan.down) for plan in plans), strict=True)
        )
        table.add_row(
            name,
            *travels,
            scope(method),
            "yes" if method.adapter.mixed_ranks else "–",
            method.paper.link.removeprefix("https://"),
        )
    wide().print(table)
    say("A, C, B: the adapter; H: the head; S: scalars of C's blocks; W: a dense update; P: the whole model.")
    say("x / y: what even and odd rounds differ in.")


def cost(
    model: Annotated[str, typer.Option(help="A model folder, a config.json, or as in `fedtri run`.")] = "minilm",
    rank: Annotated[int, typer.Option(help="The adapter's rank.", min=1)] = 8,
    targets: Annotated[str, typer.Option(help="The layers that are adapted, as in a configuration.")] = "auto",
    task: Annotated[str, typer.Option(help="What the model is for, as in a configuration.")] = "text_classification",
    labels: Annotated[int | None, typer.Option(help="Classes of the head; by default the model's own.")] = None,
    clients: Annotated[int, typer.Option(help="Clients in a round.", min=1)] = 1,
    rounds: Annotated[int, typer.Option(help="Rounds of the run.", min=1)] = 2,
    dtype: Annotated[str, typer.Option(help="The number type on the wire.")] = "float32",
    out: Annotated[Path | None, typer.Option(help="Also write the table here: NAME.json or NAME.csv.")] = None,
) -> None:
    """Say what each method sends per client and round for a model, without its weights."""
    prepare()
    from fedtri.runs import cost as costing

    found = costing.costs(
        model, task=task, rank=rank, targets=targets, labels=labels, clients=clients, rounds=rounds, dtype=dtype
    )
    whole = max(one.up + one.down for one in found)
    table = Table("method", "numbers up", "down", "bytes up", "down", "all bytes", "of full", box=box.SIMPLE_HEAD)
    for one in found:
        counts = (one.up, one.down, one.up_bytes, one.down_bytes, one.total_bytes)
        share = (one.up + one.down) / whole
        table.add_row(one.method, *(f"{value:,.0f}" for value in counts), f"{share:.3%}")
    wide().print(table)
    say(f"per client and round; all bytes: {clients} clients, {rounds} rounds, both ways, tensors alone")
    if out is not None:
        costing.write(out, found)
        say(f"wrote {out}")
