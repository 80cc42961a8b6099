"""FLoRA-NA: the pair Σq_uB_u, Σp_vA_v whose product is nearest to the mean of the products. arXiv:2509.26399.

min over p, q of ‖ Σ_k w_k B_kA_k − (Σ_u q_uB_u)(Σ_v p_vA_v) ‖_F², w_k by examples, from p = q = w (which is FedIT).
"""

from collections.abc import Sequence

from fedtri.aggregation import means, products
from fedtri.errors import FedtriError
from fedtri.messages import Reply
from fedtri.method import AdapterSpec, Method, Paper, Plan
from fedtri.state import ServerState

PAPER = Paper(
    "FLoRA-NA",
    "FLoRA-NA: Nearly Accurate Aggregation for Federated Low-Rank Adaptation",
    2025,
    "https://arxiv.org/abs/2509.26399",
)


def flora_na(*, sweeps: int = 100, align: bool = False) -> Method:
    """Learns, sends and receives A, B and H, of any ranks: smaller ones are zero-padded, and cut on the way down.

    sweeps: at most so many alternating solves. align: rotate the pair to the basis of the round before (Procrustes).
    """
    if sweeps < 1:
        raise FedtriError(f"method_options.sweeps: expected at least 1, got {sweeps}")
    plan = Plan.of(train="ABH", up="ABH", down="ABH")

    def aggregate(state: ServerState, replies: Sequence[Reply]) -> ServerState:
        weights = means.example_weights(replies)

        def solve(group: means.Pairs) -> means.Pair:
            B, A, _, _ = products.nearest_average(group.B, group.A, weights, sweeps=sweeps)
            return means.aligned(state, group, B, A) if align else (B, A)

        return means.share_pairs(state, replies, solve)

    return Method(
        "flora_na",
        PAPER,
        lambda _: plan,
        aggregate,
        adapter=AdapterSpec(kinds=("lora", "dora", "hira"), mixed_ranks=not align),
    )
