"""`fedtri deploy`: init writes a federation's folder, check says whether a site is ready."""

from pathlib import Path
from typing import Annotated

import typer

from fedtri.cli.shared import listed, say


def deploy() -> None:
    """Run on a real network: docs/deploy.md."""


def init(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The folder to write; empty or new.")],
    clients: Annotated[str, typer.Option(help="The sites' names, separated by commas.")] = "site1,site2",
    labels: Annotated[str, typer.Option(help="The names of the classes, separated by commas.")] = "",
    host: Annotated[str, typer.Option(help="The name or address under which sites reach the server.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="The server's port.", min=1, max=65535)] = 18000,
) -> None:
    """Write certificates, keys, configurations, start scripts and systemd units for a new federation."""
    from fedtri.deploy import folder as deployment

    server, *sites = deployment.write(folder, clients=listed(clients), labels=listed(labels), host=host, port=port)
    say(f"server: {server}/start, then once {server}/register, then {server}/run")
    for site in sites:
        say(f"site:   copy {site} to its machine; edit node.toml; ./check; ./start")
    say(f"certificates are for testing: replace {server}/server.pem, server.key and every ca.crt by your own")


def check(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The site's folder, with node.toml, key and ca.crt.")],
    federation: Annotated[Path, typer.Option(help="The federation's configuration, as the server has it.")],
    server: Annotated[str, typer.Option(help="Where the server is: HOST:PORT.")],
) -> None:
    """Check settings, key, server, model and data of a site; exit code 2 if one is not in order."""
    from fedtri.deploy import check as looking

    bad = 0
    for finding in looking.check(looking.Place(folder, federation, server)):
        bad += not finding.ok
        say(f"{'ok  ' if finding.ok else 'FAIL'}  {finding.what:<8}  {finding.said}")
    if bad:
        raise typer.Exit(2)
