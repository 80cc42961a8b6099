"""fedtri: federated fine-tuning of foundation models in which as little as an r x r core per layer travels."""

from importlib import import_module

__version__ = "0.1.0"

_WHERE = {
    "Config": "fedtri.config",
    "FedtriError": "fedtri.errors",
    "METHODS": "fedtri.methods",
    "load": "fedtri.report.reading",
    "load_config": "fedtri.config",
    "run": "fedtri.runs.lifecycle",
    "resume": "fedtri.runs.lifecycle",
}
__all__ = ["METHODS", "Config", "FedtriError", "load", "load_config", "resume", "run"]


def __getattr__(name: str) -> object:
    """Import what is asked for when it is asked for: `import fedtri` itself loads no torch."""
    if name not in _WHERE:
        raise AttributeError(f"module 'fedtri' has no attribute {name!r}")
    return getattr(import_module(_WHERE[name]), "load" if name == "load_config" else name)
