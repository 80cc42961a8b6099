"""Commands that train: run, start, resume."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from fedtri.cli.shared import ConfigFile, Folder, Settings, console, file_or_demo, prepare, say

if TYPE_CHECKING:
    from fedtri.config import Config
    from fedtri.tasks import Recipe

Track = Annotated[
    str | None,
    typer.Option(help="Also log to tensorboard, mlflow, wandb or trackio; rounds.jsonl is written in any case."),
]


def run(
    config: ConfigFile = None,
    method: Annotated[str | None, typer.Option(help="See `fedtri methods`.")] = None,
    data: Annotated[str | None, typer.Option(help="An embedded source, a file, a folder, or a hub name.")] = None,
    model: Annotated[str | None, typer.Option(help="minilm (embedded), a model folder, or a hub name.")] = None,
    clients: Annotated[int | None, typer.Option(help="How many clients share out the data.")] = None,
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
        file_or_demo(config, settings, data), settings, method=method, data=data, model=model, clients=clients,
        rounds=rounds, out=where, transport=transport,
    )  # fmt: skip
    prepare()
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
    _finished(folder, loaded)


def start(
    config: ConfigFile = None,
    settings: Settings = [],  # noqa: B006
) -> None:
    """Score the untrained model of every client on its own test examples."""
    from fedtri import config as configuration

    loaded = configuration.load(file_or_demo(config, settings), settings)
    prepare()
    from fedtri.runs import lifecycle

    found = lifecycle.starting(loaded)
    table = Table("metric", "mean", "lowest", "highest")
    for name in sorted({name for scores in found.values() for name in scores}):
        values = [scores[name] for scores in found.values() if name in scores]
        table.add_row(name, *(f"{value:.4f}" for value in (sum(values) / len(values), min(values), max(values))))
    console.print(table)


def resume(folder: Folder, track: Track = None) -> None:
    """Go on with an interrupted run; the result is that of a run that was never interrupted."""
    from fedtri import config as configuration
    from fedtri.storage import run_directory

    loaded = configuration.load(run_directory.require(folder) / "config.toml")
    prepare()
    import torch

    from fedtri.cli import display
    from fedtri.runs import lifecycle, tracking

    began, now = run_directory.read_environment(folder).get("threads"), torch.get_num_threads()
    if began not in (None, now):
        say(f"the run began on {began} threads and goes on with {now}: its sums round differently from here on; "
            f"OMP_NUM_THREADS={began} keeps them equal")  # fmt: skip
    with (
        tracking.tracker(track, loaded.model_dump()) as tell,
        display.display(console, loaded, run_directory.read_rounds(folder)) as shown,
    ):
        for progress in lifecycle.resume(folder, lifecycle.Listener(shown.phase, shown.step)):
            shown.round(progress.line)
            tell(folder, progress.line)
    _finished(folder, loaded)


def proposal(folder: Path, client: str, recipe: "Recipe") -> str:
    """The command to try after a run: a question to the client's model, or the page where the task answers nothing."""
    if recipe.answers is None:
        return f"fedtri report {folder} --open"
    return f'fedtri predict {folder} --client {client} "{recipe.example_input}"'


def _finished(folder: Path, config: "Config") -> None:
    """Write the run's page, print its tables, and say where everything is."""
    from fedtri import tasks
    from fedtri.cli import display
    from fedtri.report import page, reading
    from fedtri.storage import run_directory

    summary = run_directory.read_summary(folder)
    page.write([reading.load(folder)], folder / "report.html")
    console.print(display.clients(summary))
    console.print(display.results([summary]))
    adapters = ", adapters/ with a PEFT adapter for each client" if (folder / "adapters").exists() else ""
    say(f"everything is in {folder}: report.html to look at{adapters}")
    first = next(iter(summary["client_table"]))
    say(f"try: {proposal(folder, first, tasks.build(config.task, config.task_options))}")
