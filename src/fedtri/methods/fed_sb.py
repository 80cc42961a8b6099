"""Fed-SB: only the r x r core learns, between frozen orthonormal A and B, so its mean is exact. arXiv:2502.15436.

Σ p_k B C_k A = B (Σ p_k C_k) A.
"""

from collections.abc import Sequence

from fedtri.aggregation import means
from fedtri.messages import Reply
from fedtri.method import AdapterSpec, Method, Paper, Plan
from fedtri.state import ServerState

PAPER = Paper(
    "Fed-SB",
    "Fed-SB: A Silver Bullet for Extreme Communication Efficiency and Performance in (Private) "
    "Federated LoRA Fine-Tuning",
    2025,
    "https://arxiv.org/abs/2502.15436",
)


def fed_sb() -> Method:
    """Learns, sends and receives C and H; C starts at 0, A and B are derived from the run's seed."""
    plan = Plan.of(train="CH", up="CH", down="CH")

    def aggregate(state: ServerState, replies: Sequence[Reply]) -> ServerState:
        return means.share(state, means.mean(replies, frozenset("C")))

    return Method(
        "fed_sb",
        PAPER,
        lambda _: plan,
        aggregate,
        adapter=AdapterSpec(basis="orthonormal", core=True),
        averages=True,
        weights="uniform",
    )
