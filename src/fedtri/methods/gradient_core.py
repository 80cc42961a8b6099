"""Gradient core: only the r x r core learns and travels, in the basis of the clients' pooled first gradient.

Σ p_k B C_k A = B (Σ p_k C_k) A, so the mean is exact; B and A are the leading singular vectors of Σ p_k ∇_k at ΔW = 0.
"""

from collections.abc import Sequence

from fedtri.aggregation import means
from fedtri.messages import Reply
from fedtri.method import AdapterSpec, Method, Paper, Plan
from fedtri.state import ServerState

PAPER = Paper("Gradient core (ours)")


def gradient_core() -> Method:
    """Learns C and H; sends and receives C, whose mean is exact; H stays home. A and B come down once."""
    plan = Plan.of(train="CH", up="C", down="ABC")

    def aggregate(state: ServerState, replies: Sequence[Reply]) -> ServerState:
        return means.share(state, means.mean(replies, frozenset("C")))

    adapter = AdapterSpec(basis="gradient", core=True, learning_rates={"C": 0.02})
    return Method("gradient_core", PAPER, lambda _: plan, aggregate, adapter=adapter, averages=True)
