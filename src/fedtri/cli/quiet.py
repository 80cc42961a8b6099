"""The warnings of libraries that tell a user nothing, each silenced by name and with its reason; all others are shown.

The list was made by running every command with all warnings on. Python itself hides DeprecationWarning.
"""

import logging
import warnings
from dataclasses import dataclass


@dataclass(frozen=True)
class Noise:
    """A warning to silence: its category, how its text begins, the module that gives it, and why nobody need see it."""

    category: type[Warning]
    begins: str
    """A regular expression for the beginning of the message."""
    module: str
    """A regular expression for the module's name."""
    why: str


WARNINGS = (
    Noise(
        FutureWarning, "Tip: In future versions of Ray, Ray will no longer override accelerator visible devices",
        r"ray\._private\.worker", "advice to programs that start Ray themselves; Flower starts it, on every simulation",
    ),
)  # fmt: skip
LOGGERS = {"bitsandbytes": "says at import, on machines without a GPU, that it was built without one"}
"""Loggers of which errors alone are shown, and why."""


def known_noise() -> None:
    """Silence WARNINGS and LOGGERS in this process."""
    for noise in WARNINGS:
        warnings.filterwarnings("ignore", noise.begins, noise.category, noise.module)
    for name in LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
