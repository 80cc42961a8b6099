"""FedEx-LoRA: the means of A and B, and what they miss of the mean product as a dense residual. arXiv:2410.09432.

W ← W + s (Σ p_k B_kA_k − B̄Ā), so that W + s B̄Ā is the exact mean of the clients' updates.
"""

from collections.abc import Sequence

from torch import Tensor

from fedtri.adapters.layout import Key
from fedtri.aggregation import means, pairs, products
from fedtri.messages import Reply
from fedtri.method import AdapterSpec, Method, Paper, Plan
from fedtri.state import ServerState

PAPER = Paper(
    "FedEx-LoRA",
    "FedEx-LoRA: Exact Aggregation for Federated and Efficient Fine-Tuning of Foundation Models",
    2024,
    "https://arxiv.org/abs/2410.09432",
)


def fedex_lora() -> Method:
    """Learns and sends A, B and H; receives Ā, B̄, H and the dense running total W."""
    plan = Plan.of(train="ABH", up="ABH", down="ABWH")

    def aggregate(state: ServerState, replies: Sequence[Reply]) -> ServerState:
        weights = means.example_weights(replies)
        shared: dict[Key, Tensor] = {}
        for group in pairs.pairs(state, replies):
            B, A = means.mean_of(group.B, weights), means.mean_of(group.A, weights)
            left, right = products.stacked(group.B.double(), group.A.double(), weights)
            shared |= pairs.add_dense(state, group, left @ right - B.double() @ A.double())
            shared |= pairs.by_layer(group, B, A)
        return means.share(state, shared)

    return Method("fedex_lora", PAPER, lambda _: plan, aggregate, adapter=AdapterSpec(extra="W"), weights="uniform")
