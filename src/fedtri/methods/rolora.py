"""RoLoRA: B learns in even rounds and A in odd ones, so each round's mean of products is exact. arXiv:2502.01755.

In an even round A is the same everywhere: Σ p_k B_k A = (Σ p_k B_k) A; in an odd one B is.
"""

from collections.abc import Sequence

from fedtri.aggregation import means
from fedtri.messages import Reply
from fedtri.method import Method, Paper, Plan
from fedtri.state import ServerState

EVEN, ODD = Plan.of(train="BH", up="BH", down="ABH"), Plan.of(train="AH", up="AH", down="ABH")


PAPER = Paper(
    "RoLoRA",
    "Robust Federated Finetuning of LLMs via Alternating Optimization of LoRA",
    2025,
    "https://arxiv.org/abs/2502.01755",
)


def rolora() -> Method:
    """Learns and sends B and H in rounds 0, 2, …, A and H in rounds 1, 3, …; receives what changed."""

    def aggregate(state: ServerState, replies: Sequence[Reply]) -> ServerState:
        return means.share(state, means.mean(replies, frozenset("AB")))

    return Method("rolora", PAPER, lambda round: ODD if round % 2 else EVEN, aggregate, averages=True)
