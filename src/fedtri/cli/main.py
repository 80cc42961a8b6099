"""The command line: one function a command. An error is one line and exit code 2."""

import logging
import os
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import click
import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fedtri import __version__
from fedtri.deploy import commands as deployment
from fedtri.errors import FedtriError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pandas import DataFrame

    from fedtri.runs import compare as comparison

DEMO = Path(__file__).parents[1] / "config" / "demo.toml"
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
app.add_typer(deployment.app, name="deploy")
console = Console()

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="A run directory.")]
Client = Annotated[str, typer.Option(help="The client's id, as in adapters/.")]
Settings = Annotated[
    list[str],
    typer.Option("--set", metavar="KEY=VALUE", help="Any key of the configuration, also table.key; repeatable."),
]
Track = Annotated[
    str | None, typer.Option(help="Also tell tensorboard, mlflow, wandb or trackio; rounds.jsonl stays the source.")
]


@app.callback(invoke_without_command=True)
def fedtri(
    context: click.Context,
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False,
) -> None:
    """Fine-tune a foundation model across clients that keep their data."""
    if version:
        _say(f"fedtri {__version__}")
    elif context.invoked_subcommand is None:
        console.print(context.get_help())


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
    transport: Annotated[str | None, typer.Option(help="local, or flower-sim: Flower's simulation on Ray.")] = None,
    track: Track = None,
    settings: Settings = [],  # noqa: B006
) -> None:
    """Fine-tune a model across clients and write a run directory."""
    from fedtri import config as configuration

    where = None if out is None else str(out)
    loaded = configuration.load(
        config or DEMO, settings, method=method, data=data, model=model, clients=clients, rounds=rounds, out=where,
        transport=transport,
    )  # fmt: skip
    _prepare()
    from fedtri.cli import display
    from fedtri.runs import lifecycle, tracking

    folder = Path()
    with (
        tracking.tracker(track, loaded.model_dump()) as tell,
        display.display(console, loaded) as shown,
    ):
        listener = lifecycle.Listener(shown.phase, shown.step)
        for progress in lifecycle.run(loaded, listener):
            shown.round(progress.line)
            folder = progress.folder
            tell(folder, progress.line)
    _finished(folder)


@app.command()
def start(
    config: Annotated[
        Path | None, typer.Argument(metavar="[CONFIG.toml]", help="Without one: the demo's settings.")
    ] = None,
    settings: Settings = [],  # noqa: B006
) -> None:
    """Score what every client starts from on its own test examples, before any training."""
    from fedtri import config as configuration

    loaded = configuration.load(config or DEMO, settings)
    _prepare()
    from fedtri.runs import lifecycle

    found = lifecycle.starting(loaded)
    table = Table("metric", "mean", "lowest", "highest")
    for name in sorted({name for scores in found.values() for name in scores}):
        values = [scores[name] for scores in found.values() if name in scores]
        table.add_row(name, *(f"{value:.4f}" for value in (sum(values) / len(values), min(values), max(values))))
    console.print(table)


@app.command()
def resume(folder: Folder, track: Track = None) -> None:
    """Go on with a run that was interrupted; ends as if it had never been."""
    from fedtri import config as configuration
    from fedtri.storage import run_directory

    loaded = configuration.load(run_directory.require(folder) / "config.toml")
    _prepare()
    import torch

    from fedtri.cli import display
    from fedtri.runs import lifecycle, tracking

    began, now = run_directory.read_threads(folder), torch.get_num_threads()
    if began not in (None, now):
        console.print(f"the run began on {began} threads, this is {now}: float32 rounds otherwise, unless "
                      f"OMP_NUM_THREADS={began}")  # fmt: skip
    with (
        tracking.tracker(track, loaded.model_dump()) as tell,
        display.display(console, loaded, run_directory.read_rounds(folder)) as shown,
    ):
        for progress in lifecycle.resume(folder, lifecycle.Listener(shown.phase, shown.step)):
            shown.round(progress.line)
            tell(folder, progress.line)
    _finished(folder)


@app.command()
def show(folders: Annotated[list[Path], typer.Argument(metavar="DIR…", help="Run directories.")]) -> None:
    """Print the results of finished runs in one table."""
    from fedtri.cli import display
    from fedtri.storage import run_directory

    console.print(display.results([run_directory.read_summary(folder) for folder in folders]))


@app.command()
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
    _prepare()
    from fedtri.runs import finished

    how = finished.export(folder, client, to, merge=merge, engine=engine)
    _say(f"wrote {to}")
    if how is not None:
        _say(f"serve it with: {how}")


@app.command()
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
    """Score a finished run's models again on their own test data, or on the harness's tasks."""
    _prepare()
    from fedtri.runs import finished
    from fedtri.storage import run_directory

    if not tasks:
        if limit is not None or include is not None:
            raise FedtriError("--limit, --include: are for the harness; give --tasks, or leave them out")
        found = finished.evaluate(folder, client)
        title = f"{folder}: each client's own test data"
    else:
        client = client or next(iter(run_directory.read_summary(folder)["client_table"]))
        found = finished.evaluate_elsewhere(folder, client, _listed(tasks), limit=limit, include=include)
        title = f"{client} of {folder}: lm-evaluation-harness"
    names = sorted({name for scores in found.values() for name in scores})
    table = Table("task" if tasks else "client", *names, title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for row, scores in found.items():
        table.add_row(row, *(f"{scores[name]:.4f}" if name in scores else "–" for name in names))
    Console(width=max(console.width, 96)).print(table)


@app.command()
def predict(
    folder: Folder,
    client: Client,
    texts: Annotated[list[str], typer.Argument(metavar="TEXT…", help="What to answer.")],
) -> None:
    """Ask a client's tuned model, and beside it the untuned one."""
    _prepare()
    from fedtri.runs import finished

    table = Table("text", "tuned", "untuned", title=f"{client} of {folder}", title_justify="left")
    for row in finished.predict(folder, client, texts):
        table.add_row(*map(escape, (row.text, row.tuned, row.untuned)))
    console.print(table)


@app.command()
def compare(
    config: Annotated[
        Path | None, typer.Argument(metavar="[CONFIG.toml]", help="Without one: the demo's settings.")
    ] = None,
    methods: Annotated[str, typer.Option(help="Methods separated by commas; see `fedtri methods`.")] = "",
    seeds: Annotated[str | None, typer.Option(help="Seeds separated by commas; by default the config's.")] = None,
    grid: Annotated[
        list[str], typer.Option("--grid", metavar="KEY=V1,V2", help="Values of any key to try; repeatable.")
    ] = [],  # noqa: B006
    out: Annotated[Path | None, typer.Option(help="The comparison's folder; by default runs/compare-CONFIG.")] = None,
    baseline: Annotated[str | None, typer.Option(help="Whose results are subtracted; by default the first.")] = None,
    settings: Settings = [],  # noqa: B006
) -> None:
    """Run methods (and seeds, and a grid) side by side; the same call again runs only what is missing."""
    _prepare()
    from fedtri.report import tables
    from fedtri.runs import compare as comparison

    planned = comparison.plan(
        config, _listed(methods), seeds=[_whole(seed) for seed in _listed(seeds or "")], settings=settings,
        grid=dict(map(comparison.parse_grid, grid)), out=out, baseline=baseline,
    )  # fmt: skip
    try:
        _follow(comparison.run(planned))
    except KeyboardInterrupt:
        raise KeyboardInterrupt("interrupted; the same call goes on where it stopped") from None
    groups = tables.grouped(comparison.finished(planned.folder))
    _print_table(tables.readable(groups, planned.baseline).drop(columns="total"))
    _say(tables.caption(groups, planned.baseline))
    _say(f"the page is {planned.folder}/report.html, the numbers are {planned.folder}/table.csv")


@app.command()
def report(
    folders: Annotated[list[Path], typer.Argument(metavar="DIR…", help="Run directories, or folders of them.")],
    out: Annotated[Path | None, typer.Option(help="The page; by default report.html in the first folder.")] = None,
    baseline: Annotated[str | None, typer.Option(help="Whose results are subtracted; by default the first.")] = None,
    figures: Annotated[Path | None, typer.Option(metavar="DIR", help="Also write each figure to a file here.")] = None,
    kind: Annotated[str, typer.Option("--format", help="svg or png, for --figures.")] = "svg",
    opened: Annotated[bool, typer.Option("--open", help="Open the page in the browser.")] = False,
) -> None:
    """Write one HTML page about a run, or comparing several, from run directories alone."""
    from fedtri.report import figures as of_run
    from fedtri.report import files, overview, page, reading, tables

    runs = [reading.load(path) for path in reading.find(folders)]
    target = page.write(runs, out or folders[0] / "report.html", baseline)
    _say(f"wrote {target}")
    if figures is not None:
        drawn = of_run.of_run(runs[0]) if len(runs) == 1 else overview.of_groups(tables.grouped(runs))
        _say(f"wrote {len(files.write(drawn, figures, kind))} figures to {figures}")
    if opened:
        typer.launch(str(target))


@app.command()
def watch(
    folder: Folder,
    once: Annotated[bool, typer.Option("--once", help="Show it as it is now and end.")] = False,
) -> None:
    """Follow a run, running or finished, from another terminal."""
    from fedtri.cli.watch import watch

    watch(folder, console, once=once)


@app.command()
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
    Console(width=max(console.width, 96)).print(table)
    _say("A, C, B: the adapter; H: the head; S: scalars of C's blocks; W: a dense update; P: the whole model.")
    _say("x / y: what even and odd rounds differ in.")


@app.command()
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
    _prepare()
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
    Console(width=max(console.width, 96)).print(table)
    _say(f"per client and round; all bytes: {clients} clients, {rounds} rounds, both ways, tensors alone")
    if out is not None:
        costing.write(out, found)
        _say(f"wrote {out}")


def main() -> None:
    """Run the command line; a mistake of the user's ends in one line and exit code 2, Ctrl-C in one line and 130."""
    command = typer.main.get_command(app)
    try:
        with command.make_context("fedtri", sys.argv[1:]) as context:
            command.invoke(context)
    except click.exceptions.Exit as done:
        raise SystemExit(done.exit_code) from None
    except click.UsageError as error:
        path = error.ctx.command_path if error.ctx else "fedtri"
        _fail(f"{error.format_message().rstrip('.')}; see `{path} --help`")
    except FedtriError as error:
        _fail(str(error))
    except OSError as error:
        if error.filename is None:
            raise
        _fail(f"{error.filename}: {error.strerror}")
    except KeyboardInterrupt as error:
        _fail(str(error) or "interrupted", 130)


def _follow(steps: "Iterator[comparison.Step]") -> None:
    from fedtri.cli import display

    for step in steps:
        if step.line is None:
            done = "is finished already" if step.kept else f"in {step.folder}"
            _say(f"[{step.number}/{step.of}] {step.member.name} {done}")
        else:
            _say(f"  {display.describe(step.line, step.member.config.rounds)}")


def _print_table(table: "DataFrame") -> None:
    shown = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for place, heading in enumerate(table.columns):
        shown.add_column(str(heading), justify="right" if place else "left", no_wrap=True)
    for row in table.to_numpy().tolist():
        shown.add_row(*row)
    # narrower than this a row would be cut into pieces
    Console(width=max(console.width, 96)).print(shown)


def _listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _whole(text: str) -> int:
    if not text.isdecimal():
        raise FedtriError(f"--seeds: expected whole numbers separated by commas, got {text!r}")
    return int(text)


def _say(text: str) -> None:
    console.print(text, highlight=False, soft_wrap=True, markup=False)


def _fail(text: str, code: int = 2) -> NoReturn:
    print(f"fedtri: {' '.join(text.split())}", file=sys.stderr)
    raise SystemExit(code)


def _prepare() -> None:
    """Quiet the libraries before they are imported: what they would say is not news to the user."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # threads that wait a little, not for ever: measured 4 times faster beside another busy process, as fast alone
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")


def _finished(folder: Path) -> None:
    from fedtri.cli import display
    from fedtri.report import page, reading
    from fedtri.storage import run_directory

    summary = run_directory.read_summary(folder)
    page.write([reading.load(folder)], folder / "report.html")
    console.print(display.clients(summary))
    console.print(display.results([summary]))
    first = next(iter(summary["client_table"]))
    adapters = ", adapters/ with a PEFT adapter for each client" if (folder / "adapters").exists() else ""
    _say(f"everything is in {folder}: report.html to look at{adapters}")
    _say(f'try: fedtri predict {folder} --client {first} "some text"')
