"""The command line: run, resume, show, export, predict, methods. An error is one line and exit code 2."""

import os
import sys
import warnings
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.table import Table

from fedtri.errors import FedtriError

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
console = Console()

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="A run directory.")]
Client = Annotated[str, typer.Option(help="The client's id, as in adapters/.")]
Settings = Annotated[
    list[str],
    typer.Option("--set", metavar="KEY=VALUE", help="Any key of the configuration, also table.key; repeatable."),
]


@app.command()
def run(
    config: Annotated[
        Path | None, typer.Argument(metavar="[CONFIG.toml]", help="Without one: the demo's settings.")
    ] = None,
    method: Annotated[str | None, typer.Option(help="See `fedtri methods`.")] = None,
    data: Annotated[str | None, typer.Option(help="An embedded source, a file, a folder, or a hub name.")] = None,
    model: Annotated[str | None, typer.Option(help="minilm (embedded), a model folder, or a hub name.")] = None,
    clients: Annotated[int | None, typer.Option(help="How many clients the data are dealt to.")] = None,
    rounds: Annotated[int | None, typer.Option(help="How many rounds.")] = None,
    out: Annotated[Path | None, typer.Option(help="The run directory; by default runs/METHOD-N.")] = None,
    settings: Settings = [],  # noqa: B006
) -> None:
    """Fine-tune a model across clients and write a run directory."""
    from fedtri import config as configuration

    where = None if out is None else str(out)
    loaded = configuration.load(
        config, settings, method=method, data=data, model=model, clients=clients, rounds=rounds, out=where
    )
    _prepare()
    from fedtri import display, runs

    with display.display(console, loaded.rounds, loaded.steps) as shown:
        listener = runs.Listener(shown.phase, shown.step)
        folder = Path()
        for progress in runs.run(loaded, listener):
            shown.round(progress.line)
            folder = progress.folder
    _finished(folder)


@app.command()
def resume(folder: Folder) -> None:
    """Go on with a run that was interrupted; ends as if it had never been."""
    from fedtri import config as configuration
    from fedtri import rundir

    loaded = configuration.load(rundir.require(folder) / "config.toml")
    _prepare()
    from fedtri import display, runs

    with display.display(console, loaded.rounds, loaded.steps, len(rundir.read_rounds(folder))) as shown:
        for progress in runs.resume(folder, runs.Listener(shown.phase, shown.step)):
            shown.round(progress.line)
    _finished(folder)


@app.command()
def show(folders: Annotated[list[Path], typer.Argument(metavar="DIR…", help="Run directories.")]) -> None:
    """Print the results of finished runs in one table."""
    from fedtri import display, rundir

    console.print(display.results([rundir.read_summary(folder) for folder in folders]))


@app.command()
def export(
    folder: Folder,
    client: Client,
    to: Annotated[Path, typer.Option(help="The folder to write; must not exist.")],
    merge: Annotated[bool, typer.Option("--merge", help="Write the whole model with the adapter merged in.")] = False,
) -> None:
    """Write a client's tuned model: a PEFT LoRA adapter, or the merged model."""
    _prepare()
    from fedtri import tuned

    tuned.export(folder, client, to, merge=merge)
    console.print(f"wrote {to}", highlight=False)


@app.command()
def predict(
    folder: Folder,
    client: Client,
    texts: Annotated[list[str], typer.Argument(metavar="TEXT…", help="What to classify.")],
) -> None:
    """Classify texts with a client's tuned model, beside the untuned one."""
    _prepare()
    from fedtri import tuned

    table = Table("text", "tuned", "untuned", title=f"{client} of {folder}", title_justify="left")
    for row in tuned.predict(folder, client, texts):
        table.add_row(row.text, *(f"{label} {probability:.2f}" for label, probability in (row.tuned, row.untuned)))
    console.print(table)


@app.command()
def methods() -> None:
    """List the methods: what learns, what travels, and where each is from."""
    from fedtri.methods import METHODS, build

    table = Table("method", "learns", "up", "down", "source")
    for name in METHODS:
        method = build(name)
        plan = method.plan(0)
        travels = (" ".join(f for f in "ABCH" if f in kinds) or "–" for kinds in (plan.train, plan.up, plan.down))
        table.add_row(name, *travels, method.source)
    console.print(table)


def main() -> None:
    """Run the command line; our own errors end in one line and exit code 2."""
    try:
        app(standalone_mode=True)
    except FedtriError as error:
        _fail(" ".join(str(error).split()))
    except KeyboardInterrupt:
        _fail("interrupted; `fedtri resume DIR` goes on from the last finished round", 130)


def _fail(text: str, code: int = 2) -> NoReturn:
    print(f"fedtri: {text}", file=sys.stderr)
    raise SystemExit(code)


def _prepare() -> None:
    """Quiet the libraries before they are imported: what they would say is not news to the user."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # threads that wait a little, not for ever: measured 4 times faster beside another busy process, as fast alone
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    warnings.filterwarnings("ignore")


def _finished(folder: Path) -> None:
    from fedtri import display, rundir

    summary = rundir.read_summary(folder)
    console.print(display.clients(summary))
    console.print(display.results([summary]))
    first = next(iter(summary["client_table"]))
    console.print(
        f"everything is in {folder}; an adapter in PEFT format for each client in {folder}/adapters",
        highlight=False,
        soft_wrap=True,
    )
    console.print(f'try: fedtri predict {folder} --client {first} "some text"', highlight=False, soft_wrap=True)
