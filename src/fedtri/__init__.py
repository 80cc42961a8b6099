"""fedtri: federated fine-tuning of foundation models in which as little as an r x r core per layer travels."""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOME = {
    # to run and to read
    "Config": "fedtri.config",
    "FedtriError": "fedtri.errors",
    "METHODS": "fedtri.methods",
    "load": "fedtri.report.reading",
    "load_config": "fedtri.config",
    "resume": "fedtri.runs.lifecycle",
    "run": "fedtri.runs.lifecycle",
    # to write a method
    "AdapterSpec": "fedtri.method",
    "Factors": "fedtri.adapters.layout",
    "Key": "fedtri.adapters.layout",
    "LocalRound": "fedtri.method",
    "Method": "fedtri.method",
    "Paper": "fedtri.method",
    "Plan": "fedtri.method",
    "Reply": "fedtri.messages",
    "ServerState": "fedtri.state",
    "Similarity": "fedtri.state",
    "Trained": "fedtri.method",
    "Update": "fedtri.method",
    "example_weights": "fedtri.aggregation.means",
    "mean": "fedtri.aggregation.means",
    "only": "fedtri.adapters.layout",
    "personalise": "fedtri.aggregation.means",
    "share": "fedtri.aggregation.means",
    "share_pairs": "fedtri.aggregation.pairs",
    "train_steps": "fedtri.method",
}
__all__ = [*_HOME]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    """Import what is asked for when it is asked for: `import fedtri` itself loads no torch."""
    if name not in _HOME:
        raise AttributeError(f"module 'fedtri' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), "load" if name == "load_config" else name)
