"""Commands that answer before anything runs: methods, cost."""

from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from fedtri.cli.shared import console, prepare, print_whole, say


def methods() -> None:
    """List the methods: what learns, what travels, and the paper each is from."""
    from fedtri.adapters.layout import FACTORS
    from fedtri.errors import FedtriError
    from fedtri.methods import build, names, scope

    def letters(kinds: frozenset[str]) -> str:
        return "".join(factor for factor in FACTORS if factor in kinds) or "–"

    columns = ("method", "learns", "up", "down", "factors", "ranks", "paper", "year", "link")
    table, broken = Table(*columns, box=box.SIMPLE_HEAD), list[FedtriError]()
    for name in names():
        try:
            method = build(name)
        except FedtriError as error:  # a package that is installed beside fedtri
            broken.append(error)
            continue
        plans, paper = [method.plan(round) for round in (0, 1)], method.paper
        ways = zip(*((plan.train, plan.up, plan.down) for plan in plans), strict=True)
        table.add_row(
            name,
            *("/".join(dict.fromkeys(map(letters, rounds))) for rounds in ways),
            scope(method),
            "mixed" if method.adapter.mixed_ranks else "one",
            paper.name,
            str(paper.year or "–"),
            paper.link.removeprefix("https://") or "–",
        )
    Console(width=max(console.width, 112)).print(table)
    say("A, C, B: the adapter; a, b: a second one; H: the head; S: scalars of C's blocks; W: a dense update;")
    say("P: the whole model. x/y: what even and odd rounds differ in. A method of your own: FILE.py:FUNCTION.")
    for error in broken:
        say(str(error))


def cost(
    model: Annotated[str, typer.Option(help="A model folder, a config.json, or as in `fedtri run`.")] = "minilm",
    rank: Annotated[int, typer.Option(help="The adapter's rank.", min=1)] = 8,
    targets: Annotated[str, typer.Option(help="The layers that are adapted, as in a configuration.")] = "auto",
    task: Annotated[str, typer.Option(help="What the model is for, as in a configuration.")] = "text_classification",
    labels: Annotated[int | None, typer.Option(help="Classes of the head; by default the model's own.")] = None,
    clients: Annotated[int, typer.Option(help="Clients in a round.", min=1)] = 1,
    rounds: Annotated[int, typer.Option(help="Rounds of the run.", min=1)] = 2,
    up: Annotated[str, typer.Option(help="The number type in which clients send.")] = "float32",
    down: Annotated[str, typer.Option(help="The number type in which they are sent what came of it.")] = "float32",
    basis: Annotated[str, typer.Option(help="The number type of what travels once.")] = "float32",
    out: Annotated[Path | None, typer.Option(help="Also write the table here: NAME.json or NAME.csv.")] = None,
) -> None:
    """Say what each method sends per client and round for a model, without its weights."""
    prepare()
    from fedtri.communication.compression import Types
    from fedtri.runs import cost as costing

    found = costing.costs(
        model,
        task=task,
        rank=rank,
        targets=targets,
        labels=labels,
        clients=clients,
        rounds=rounds,
        wire=Types(up, down, basis),
    )
    whole = max(one.up + one.down for one in found)
    table = Table(
        "method", "numbers up", "down", "bytes up", "down", "once", "all bytes", "of full", box=box.SIMPLE_HEAD
    )
    for one in found:
        counts = (one.up, one.down, one.up_bytes, one.down_bytes, one.once_bytes, one.total_bytes)
        share = (one.up + one.down) / whole
        table.add_row(one.method, *(f"{value:,.0f}" for value in counts), f"{share:.3%}")
    print_whole(table)
    say(f"per client and round; once: a basis, both ways; all bytes: {clients} clients, {rounds} rounds, tensors alone")
    if out is not None:
        costing.write(out, found)
        say(f"wrote {out}")
