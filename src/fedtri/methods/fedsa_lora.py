"""FedSA-LoRA: A, which learns what all have in common, is averaged; B and H stay home. arXiv:2410.01463."""

from collections.abc import Sequence

from fedtri.aggregation import means
from fedtri.messages import Reply
from fedtri.method import Method, Plan
from fedtri.state import ServerState


def fedsa_lora() -> Method:
    """Learns A, B and H; sends and receives A."""
    plan = Plan.of(train="ABH", up="A", down="A")

    def aggregate(state: ServerState, replies: Sequence[Reply]) -> ServerState:
        return means.share(state, means.mean(replies, frozenset("A")))

    return Method(
        "fedsa_lora",
        "arXiv:2410.01463",
        lambda _: plan,
        aggregate,
        adapters=("lora", "dora", "hira"),
        server_optimizer=True,
    )
