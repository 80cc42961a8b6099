"""FedSA-LoRA: A, which learns what all have in common, is averaged; B and H stay home. arXiv:2410.01463."""

from collections.abc import Sequence

from fedtri import combine
from fedtri.types import Method, Plan, Reply, ServerState


def fedsa_lora() -> Method:
    """Learns A, B and H; sends and receives A."""
    plan = Plan.of(train="ABH", up="A", down="A")

    def aggregate(state: ServerState, replies: Sequence[Reply]) -> ServerState:
        return combine.share(state, combine.mean(replies, frozenset("A")))

    return Method(
        "fedsa_lora",
        "arXiv:2410.01463",
        lambda _: plan,
        aggregate,
        adapters=("lora", "dora", "hira"),
        server_optimizer=True,
    )
