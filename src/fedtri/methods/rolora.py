"""RoLoRA: B learns in even rounds and A in odd ones, so each round's mean of products is exact. arXiv:2502.01755.

In an even round A is the same everywhere: Σ p_k B_k A = (Σ p_k B_k) A; in an odd one B is.
"""

from collections.abc import Sequence

from fedtri import combine
from fedtri.types import Method, Plan, Reply, ServerState

EVEN, ODD = Plan.of(train="BH", up="BH", down="ABH"), Plan.of(train="AH", up="AH", down="ABH")


def rolora() -> Method:
    """Learns and sends B and H in rounds 0, 2, …, A and H in rounds 1, 3, …; receives what changed."""

    def aggregate(state: ServerState, replies: Sequence[Reply]) -> ServerState:
        return combine.share(state, combine.mean(replies, frozenset("AB")))

    return Method(
        "rolora", "arXiv:2502.01755", lambda round: ODD if round % 2 else EVEN, aggregate, server_optimizer=True
    )
