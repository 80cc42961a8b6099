"""What a round's phases and metrics are called, which of them are better when lower, and the spread over clients.

Both the round loop, which writes rounds.jsonl, and those who read it take the names from here.
"""

from collections.abc import Mapping
from typing import Any, Literal

Phase = Literal["basis", "sketch", "train", "evaluate"]
"""What the server can ask of a client. The order of PHASES is their code on the wire."""
PHASES: tuple[Phase, ...] = ("basis", "sketch", "train", "evaluate")
ONCE: tuple[Phase, ...] = ("basis", "sketch")
"""The phases in which a client answers once in a run. It is sent no tensors, and its bytes are counted apart."""
STAGES = ("basis", "sketch", "train", "aggregate", "evaluate")
"""The parts of a round whose seconds are counted, in order."""

ACCURACY, LOSS = "accuracy", "loss"
"""On a client's test split."""
TRAIN_LOSS = "train_loss"
"""Mean over the steps of local training."""
VALIDATION_LOSS = "validation_loss"
PERSONAL = "_personal"
"""Ends the name of a metric of a second, personal model that a method keeps beside the one it shares."""
LOCAL = "_local"
"""In rounds.jsonl, ends the name of a metric after local training; without it, the metric is after aggregation."""
SPREADS = ("accuracy", "accuracy_local", "test_loss", "test_loss_local")
"""What a line of rounds.jsonl always has a spread of (or null): a client's "loss" on its test split is "test_loss"."""
LOWER_IS_BETTER = frozenset({LOSS, TRAIN_LOSS, VALIDATION_LOSS, "test_loss", "perplexity"})
IN_A_LINE = frozenset({ACCURACY, LOSS, TRAIN_LOSS, VALIDATION_LOSS, ACCURACY + PERSONAL, LOSS + PERSONAL})
"""Metrics with a place of their own in a line of rounds.jsonl; all others stand under "metrics"."""


def higher_is_better(name: str) -> bool:
    """Whether more of this metric is better, whatever ends its name."""
    return name.removesuffix(LOCAL).removesuffix(PERSONAL) not in LOWER_IS_BETTER


def spread(name: str, values: Mapping[str, float]) -> dict[str, Any] | None:
    """The mean, worst and best of a metric over clients, and each client's value; None where nobody reported it."""
    if not values:
        return None
    low, high = min(values.values()), max(values.values())
    worst, best = (low, high) if higher_is_better(name) else (high, low)
    return {"mean": sum(values.values()) / len(values), "worst": worst, "best": best, "clients": dict(values)}
