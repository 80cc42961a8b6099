"""FedIT (also FedPETuning's LoRA): clients get back the weighted means of A and of B. arXiv:2305.05644.

The mean of the factors is not the mean of the products: Σ p_k B_k A_k ≠ (Σ p_k B_k)(Σ p_k A_k).
"""

from collections.abc import Sequence

from fedtri.aggregation import means
from fedtri.messages import Reply
from fedtri.method import AdapterSpec, Method, Paper, Plan
from fedtri.state import ServerState

PAPER = Paper(
    "FedIT",
    "Towards Building the Federated GPT: Federated Instruction Tuning",
    2023,
    "https://arxiv.org/abs/2305.05644",
)


def fedit() -> Method:
    """Learns, sends and receives A, B and H."""
    plan = Plan.of(train="ABH", up="ABH", down="ABH")

    def aggregate(state: ServerState, replies: Sequence[Reply]) -> ServerState:
        return means.share(state, means.mean(replies, frozenset("AB")))

    return Method(
        "fedit",
        PAPER,
        lambda _: plan,
        aggregate,
        adapter=AdapterSpec(kinds=("lora", "dora", "hira")),
        averages=True,
    )
