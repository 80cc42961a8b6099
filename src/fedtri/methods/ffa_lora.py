"""FFA-LoRA: A stays as drawn, B learns and is averaged, so the mean of products is exact. arXiv:2403.12313.

Σ p_k B_k A = (Σ p_k B_k) A.
"""

from collections.abc import Sequence

from fedtri.aggregation import means
from fedtri.messages import Reply
from fedtri.method import Method, Plan
from fedtri.state import ServerState


def ffa_lora() -> Method:
    """Learns, sends and receives B and H; A is the same everywhere, derived from the run's seed."""
    plan = Plan.of(train="BH", up="BH", down="BH")

    def aggregate(state: ServerState, replies: Sequence[Reply]) -> ServerState:
        return means.share(state, means.mean(replies, frozenset("B")))

    return Method(
        "ffa_lora",
        "arXiv:2403.12313",
        lambda _: plan,
        aggregate,
        adapters=("lora", "dora", "hira"),
        server_optimizer=True,
    )
