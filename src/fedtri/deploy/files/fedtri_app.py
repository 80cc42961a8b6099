"""What `flwr run` starts at both ends: fedtri, with the federation.toml that lies beside this file."""

from collections.abc import Mapping
from pathlib import Path

from fedtri.communication.flower_calls import Called, Grid, client_app, server_app

FEDERATION = Path(__file__).with_name("federation.toml")


def answer(call: Called, node_config: Mapping[str, object], run_config: Mapping[str, object]) -> bytes:
    """A site's answer."""
    from fedtri.deploy import worker

    return worker.answer(FEDERATION, call, node_config, run_config)


def lead(grid: Grid, run_config: Mapping[str, object]) -> None:
    """The server's rounds."""
    from fedtri.deploy import coordinator

    coordinator.lead(FEDERATION, grid, run_config)


client = client_app(answer)
server = server_app(lead)
