"""`fedtri deploy`: init writes a federation's folder, check says whether a site is ready, export its tuned adapter."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

app = typer.Typer(help="Run on a real network: docs/deploy.md.", no_args_is_help=True, pretty_exceptions_enable=False)
console = Console()


@app.callback()
def deploy() -> None:
    """Run on a real network: docs/deploy.md."""


@app.command()
def init(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The folder to write; empty or new.")],
    clients: Annotated[str, typer.Option(help="The sites' names, separated by commas.")] = "site1,site2",
    labels: Annotated[str, typer.Option(help="The names of the classes, separated by commas.")] = "",
    host: Annotated[str, typer.Option(help="The name or address under which sites reach the server.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="The server's port.", min=1, max=65535)] = 18000,
) -> None:
    """Write certificates, keys, configurations, start scripts and examples of units for a new federation."""
    from fedtri.deploy import folder as deployment

    names = [[part.strip() for part in text.split(",") if part.strip()] for text in (clients, labels)]
    server, *sites = deployment.write(folder, clients=names[0], labels=names[1], host=host, port=port)
    _say(f"server: {server}/start, then once {server}/register, then {server}/run")
    for site in sites:
        _say(f"site:   copy {site} to its machine; edit node.toml; ./check; ./start")
    _say(f"certificates are for testing: replace {server}/server.pem, server.key and every ca.crt by your own")


def _say(text: str) -> None:
    console.print(text, highlight=False, soft_wrap=True, markup=False)
