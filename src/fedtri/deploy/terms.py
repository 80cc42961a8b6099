"""The configuration that both ends of a network run share, and the digest that says it is the same."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from fedtri import config as configuration
from fedtri.config import Config
from fedtri.errors import FedtriError
from fedtri.runs.simulation import choose_task

OWN = {
    "model", "data", "device", "out", "clients", "partition", "data_options", "simulation", "columns", "rounds",
    "transport",
}  # fmt: skip
"""Keys in which the ends may differ, and rounds, which may be raised when a run is resumed."""


def common(path: Path, run_config: Mapping[str, object]) -> Config:
    """The federation's configuration: its file, and over it what `flwr run --run-config` gives that is not empty.

    Raises FedtriError where the file does not say who takes part or which classes there are.
    """
    given = {key: value for key, value in run_config.items() if value not in ("", 0)}
    config = configuration.load(path, (), **given)  # pyright: ignore[reportArgumentType]
    if config.labels == "own":
        raise FedtriError(f'{path}: labels: "own" exists in one process only; leave it out')
    for key, least in (("clients", 2), ("labels", 2 if choose_task(config).classifies else 0)):
        found = getattr(config.network, key)
        if len(found) < least or len(set(found)) < len(found):
            raise FedtriError(f"{path}: network.{key}: expected at least {least} names, each once, got {found}")
    if config.network.minimum > len(config.network.clients):
        raise FedtriError(
            f"{path}: network.minimum: expected at most the {len(config.network.clients)} of network.clients, "
            f"got {config.network.minimum}"
        )
    return config


def fingerprint(config: Config) -> bytes:
    """8 bytes that differ where method, schema of the wire or any setting that both ends use differs."""
    table = config.model_dump(exclude=OWN)
    table["network"] = {"labels": config.network.labels}
    return hashlib.blake2b(json.dumps(table, sort_keys=True).encode(), digest_size=8).digest()
