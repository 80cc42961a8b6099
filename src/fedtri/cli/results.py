"""Commands that show what came out of runs: compare, show, report, watch."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.table import Table

from fedtri.cli.shared import (
    Baseline,
    ConfigFile,
    Folder,
    Settings,
    console,
    file_or_demo,
    listed,
    prepare,
    print_whole,
    say,
)
from fedtri.errors import FedtriError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pandas import DataFrame

    from fedtri.runs import compare as comparison


def compare(
    config: ConfigFile = None,
    methods: Annotated[str, typer.Option(help="Methods separated by commas; see `fedtri methods`.")] = "",
    seeds: Annotated[str | None, typer.Option(help="Seeds separated by commas; by default the config's.")] = None,
    grid: Annotated[
        list[str], typer.Option("--grid", metavar="KEY=V1,V2", help="Values of any key to try; repeatable.")
    ] = [],  # noqa: B006
    out: Annotated[Path | None, typer.Option(help="The comparison's folder; by default runs/compare-CONFIG.")] = None,
    baseline: Baseline = None,
    tune: Annotated[
        bool, typer.Option("--tune", help="First choose each method's learning rate on validation examples.")
    ] = False,
    tune_rounds: Annotated[int | None, typer.Option(min=1, help="Rounds of each try; by default half.")] = None,
    equal: Annotated[
        str | None, typer.Option(help="rank, parameters or bytes: what is equal; ranks are set to make it so.")
    ] = None,
    settings: Settings = [],  # noqa: B006
) -> None:
    """Run methods, seeds and a grid of settings; the same call again runs only what is missing."""
    prepare()
    from fedtri.report import tables
    from fedtri.runs import compare as comparison

    planned = comparison.plan(
        file_or_demo(config, settings), listed(methods), settings=settings,
        seeds=[_whole(seed) for seed in listed(seeds or "")], grid=dict(map(comparison.parse_grid, grid)), out=out,
        baseline=baseline, footing=equal, tune=tune, tune_rounds=tune_rounds,
    )  # fmt: skip
    try:
        _follow(comparison.run(planned))
    except KeyboardInterrupt:
        raise KeyboardInterrupt("interrupted; the same call goes on where it stopped") from None
    groups = tables.grouped(comparison.finished(planned.folder))
    _print_table(tables.readable(groups, planned.baseline))
    say(tables.caption(groups, planned.baseline))
    say(f"the page is {planned.folder}/report.html, the numbers are {planned.folder}/table.csv")


def show(folders: Annotated[list[Path], typer.Argument(metavar="DIR…", help="Run directories.")]) -> None:
    """Print the results of finished runs in one table."""
    from fedtri.cli import display
    from fedtri.storage import run_directory

    console.print(display.results([run_directory.read_summary(folder) for folder in folders]))


def report(
    folders: Annotated[list[Path], typer.Argument(metavar="DIR…", help="Run directories, or folders of them.")],
    out: Annotated[Path | None, typer.Option(help="The page; by default report.html in the first folder.")] = None,
    baseline: Baseline = None,
    figures: Annotated[Path | None, typer.Option(metavar="DIR", help="Also write each figure to a file here.")] = None,
    kind: Annotated[str, typer.Option("--format", help="svg or png, for --figures.")] = "svg",
    opened: Annotated[bool, typer.Option("--open", help="Open the page in the browser.")] = False,
) -> None:
    """Write one HTML page about a run, or comparing several, from run directories alone."""
    from fedtri.report import figures as of_run
    from fedtri.report import files, overview, page, reading, tables

    runs = [reading.load(path) for path in reading.find(folders)]
    target = page.write(runs, out or folders[0] / "report.html", baseline)
    say(f"wrote {target}")
    if figures is not None:
        drawn = of_run.of_run(runs[0]) if len(runs) == 1 else overview.of_groups(tables.grouped(runs))
        say(f"wrote {len(files.write(drawn, figures, kind))} figures to {figures}")
    if opened:
        typer.launch(str(target))


def watch(
    folder: Folder,
    once: Annotated[bool, typer.Option("--once", help="Show it as it is now and end.")] = False,
) -> None:
    """Follow a run, running or finished, from another terminal."""
    from fedtri.cli.watch import watch

    watch(folder, console, once=once)


def _follow(steps: "Iterator[comparison.Step]") -> None:
    from fedtri.cli import display

    for step in steps:
        if step.line is None:
            done = "is finished already" if step.kept else f"in {step.folder}"
            say(f"[{step.number}/{step.of}] {step.member.name} {done}")
        else:
            say(f"  {display.describe(step.line, step.member.config.rounds)}")


def _print_table(table: "DataFrame") -> None:
    """Print a table of text, numbers to the right."""
    shown = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for place, heading in enumerate(table.columns):
        shown.add_column(str(heading), justify="right" if place else "left", no_wrap=True)
    for row in table.to_numpy().tolist():
        shown.add_row(*row)
    print_whole(shown)


def _whole(text: str) -> int:
    if not text.isdecimal():
        raise FedtriError(f"--seeds: expected whole numbers separated by commas, got {text!r}")
    return int(text)
