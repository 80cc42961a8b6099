"""FedSA-LoRA: A, which learns what all have in common, is averaged; B and H stay home. arXiv:2410.01463."""

from collections.abc import Sequence

from fedtri.aggregation import means
from fedtri.messages import Reply
from fedtri.method import AdapterSpec, Method, Paper, Plan
from fedtri.state import ServerState

PAPER = Paper(
    "FedSA-LoRA",
    "Selective Aggregation for Low-Rank Adaptation in Federated Learning",
    2024,
    "https://arxiv.org/abs/2410.01463",
)


def fedsa_lora() -> Method:
    """Learns A, B and H; sends and receives A."""
    plan = Plan.of(train="ABH", up="A", down="A")

    def aggregate(state: ServerState, replies: Sequence[Reply]) -> ServerState:
        return means.share(state, means.mean(replies, frozenset("A")))

    return Method(
        "fedsa_lora",
        PAPER,
        lambda _: plan,
        aggregate,
        adapter=AdapterSpec(kinds=("lora", "dora", "hira")),
        averages=True,
    )
