"""What both ends of a network run derive from federation.toml: the configuration, and the Spec."""

from collections.abc import Mapping
from pathlib import Path

from fedtri import config as configuration
from fedtri.config import Config
from fedtri.errors import FedtriError
from fedtri.methods import networked, refuse_file
from fedtri.runs.spec import Spec, spec_of, task_of


def common(path: Path, run_config: Mapping[str, object]) -> Config:
    """The federation's configuration: its file, overridden by what `flwr run --run-config` gives that is not empty.

    Raises FedtriError where the file does not say who takes part or which classes there are.
    """
    given = {key: value for key, value in run_config.items() if value not in ("", 0)}
    config = configuration.load(path, (), **given)  # pyright: ignore[reportArgumentType]
    refuse_file(config.method)
    if config.labels == "own":
        raise FedtriError(f'{path}: labels: "own" exists in one process only; leave it out')
    for key, least in (("clients", 2), ("labels", 2 if task_of(config).classifies else 0)):
        found = getattr(config.network, key)
        if len(found) < least or len(set(found)) < len(found):
            raise FedtriError(f"{path}: network.{key}: expected at least {least} names, each once, got {found}")
    if config.network.minimum > len(config.network.clients):
        raise FedtriError(
            f"{path}: network.minimum: expected at most the {len(config.network.clients)} of network.clients, "
            f"got {config.network.minimum}"
        )
    return config


def agreed(config: Config) -> Spec:
    """The Spec of a network run, which is the same at both ends.

    Raises FedtriError in one line, for a method that exists in simulation only too.
    """
    spec = spec_of(config, config.network.clients, config.network.labels)
    networked(spec.method)
    return spec
