"""Commands that use the models of a finished run: export, evaluate, predict."""

from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.markup import escape
from rich.table import Table

from fedtri.cli.shared import Client, Folder, console, listed, prepare, print_whole, say
from fedtri.errors import FedtriError


def export(
    folder: Folder,
    client: Client,
    to: Annotated[Path, typer.Option(help="The folder to write; must not exist.")],
    merge: Annotated[bool, typer.Option("--merge", help="Write the whole model with the adapter merged in.")] = False,
    engine: Annotated[
        str | None, typer.Option("--for", metavar="ENGINE", help="Check that vllm will take it, and say how.")
    ] = None,
) -> None:
    """Write a client's tuned model: a PEFT LoRA adapter, or the merged model."""
    prepare()
    from fedtri.runs import finished

    how = finished.export(folder, client, to, merge=merge, engine=engine)
    say(f"wrote {to}")
    if how is not None:
        say(f"serve it with: {how}")


def evaluate(
    folder: Folder,
    client: Annotated[
        str | None, typer.Option(help="One client's id; by default all (with --tasks, the first).")
    ] = None,
    tasks: Annotated[
        str, typer.Option(help="Of lm-evaluation-harness, separated by commas: gsm8k,mbpp; needs fedtri[eval].")
    ] = "",
    limit: Annotated[int | None, typer.Option(help="With --tasks: at most so many examples a task.", min=1)] = None,
    include: Annotated[
        Path | None, typer.Option(metavar="DIR", help="With --tasks: further tasks in the harness's YAML format.")
    ] = None,
) -> None:
    """Score a finished run's models on their own test data, or on tasks of lm-evaluation-harness."""
    prepare()
    from fedtri.runs import finished
    from fedtri.storage import run_directory

    if not tasks:
        if limit is not None or include is not None:
            raise FedtriError("--limit, --include: are for the harness; give --tasks, or leave them out")
        found = finished.evaluate(folder, client)
        title = f"{folder}: each client's own test data"
    else:
        client = client or next(iter(run_directory.read_summary(folder)["client_table"]))
        found = finished.evaluate_elsewhere(folder, client, listed(tasks), limit=limit, include=include)
        title = f"{client} of {folder}: lm-evaluation-harness"
    names = sorted({name for scores in found.values() for name in scores})
    table = Table("task" if tasks else "client", *names, title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for row, scores in found.items():
        table.add_row(row, *(f"{scores[name]:.4f}" if name in scores else "–" for name in names))
    print_whole(table)


def predict(
    folder: Folder,
    client: Client,
    texts: Annotated[list[str], typer.Argument(metavar="TEXT…", help="What to answer.")],
) -> None:
    """Ask a client's tuned model, and the untuned one for comparison."""
    prepare()
    from fedtri.runs import finished

    table = Table("text", "tuned", "untuned", title=f"{client} of {folder}", title_justify="left")
    for row in finished.predict(folder, client, texts):
        table.add_row(*map(escape, (row.text, row.tuned, row.untuned)))
    console.print(table)
