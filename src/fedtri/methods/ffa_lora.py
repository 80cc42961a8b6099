"""FFA-LoRA: A stays as drawn, B learns and is averaged, so the mean of products is exact. arXiv:2403.12313.

Σ p_k B_k A = (Σ p_k B_k) A.
"""

from collections.abc import Sequence

from fedtri.aggregation import means
from fedtri.messages import Reply
from fedtri.method import AdapterSpec, Method, Paper, Plan
from fedtri.state import ServerState

PAPER = Paper(
    "FFA-LoRA",
    "Improving LoRA in Privacy-preserving Federated Learning",
    2024,
    "https://arxiv.org/abs/2403.12313",
)


def ffa_lora() -> Method:
    """Learns, sends and receives B and H; A is the same everywhere, derived from the run's seed."""
    plan = Plan.of(train="BH", up="BH", down="BH")

    def aggregate(state: ServerState, replies: Sequence[Reply]) -> ServerState:
        return means.share(state, means.mean(replies, frozenset("B")))

    return Method(
        "ffa_lora",
        PAPER,
        lambda _: plan,
        aggregate,
        adapter=AdapterSpec(kinds=("lora", "dora", "hira")),
        averages=True,
    )
