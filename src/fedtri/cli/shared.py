"""What the commands share: the terminal, options, and what is settled before a library is imported."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.table import Table

from fedtri.cli import quiet

DEMO = Path(__file__).parents[1] / "config" / "demo.toml"
console = Console()

ConfigFile = Annotated[
    Path | None,
    typer.Argument(
        metavar="[CONFIG.toml]", help="Without one: the demo's settings, or the defaults where data are named."
    ),
]
Folder = Annotated[Path, typer.Argument(metavar="DIR", help="A run directory.")]
Client = Annotated[str, typer.Option(help="The client's id, as in adapters/.")]
Baseline = Annotated[
    str | None, typer.Option(help="The method that the others are compared with; by default the first.")
]
Settings = Annotated[
    list[str],
    typer.Option("--set", metavar="KEY=VALUE", help="Any key of the configuration, also table.key; repeatable."),
]


def say(text: str) -> None:
    """Print one line as it is: no markup, no colours, no wrapping, so that it can be copied."""
    console.print(text, highlight=False, soft_wrap=True, markup=False)


def file_or_demo(config: Path | None, settings: Sequence[str], data: str | None = None) -> Path | None:
    """The configuration file that is given, or else the demo's; None, the defaults, where other data are named.

    The demo's file also says how many of its texts are dealt, which would cut other data short.
    """
    named = data is not None or any(setting.partition("=")[0].strip() == "data" for setting in settings)
    return config or (None if named else DEMO)


def fail(text: str, code: int = 2) -> NoReturn:
    """End the program with one line on standard error and this exit code."""
    print(f"fedtri: {' '.join(text.split())}", file=sys.stderr)
    raise SystemExit(code)


def print_whole(table: Table) -> None:
    """Print a table with no word cut; in a terminal that is narrower its lines wrap."""
    widest = Console(width=sys.maxsize).measure(table).maximum
    Console(width=max(console.width, widest)).print(table)


def listed(text: str) -> list[str]:
    """The parts of a text that is separated by commas, without blanks and empty parts."""
    return [part.strip() for part in text.split(",") if part.strip()]


def prepare() -> None:
    """Settle what libraries read when they are imported. Call it before torch or transformers is."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # threads that wait briefly before they sleep: measured 4 times faster beside a busy process, as fast alone
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    quiet.known_noise()
