"""LoRA-FAIR: the means of A and B, B corrected so that their product points where the mean product does.

ΔB minimises 1 − cos(Σ p_k B_kA_k, (B̄ + ΔB)Ā) + λ‖ΔB‖_F; clients get back Ā and B̄ + ΔB. arXiv:2411.14961.
"""

from collections.abc import Sequence

from fedtri.aggregation import means, products
from fedtri.errors import FedtriError
from fedtri.messages import Reply
from fedtri.method import Method, Paper, Plan
from fedtri.state import ServerState

PAPER = Paper(
    "LoRA-FAIR",
    "LoRA-FAIR: Federated LoRA Fine-Tuning with Aggregation and Initialization Refinement",
    2024,
    "https://arxiv.org/abs/2411.14961",
)


def lora_fair(*, lam: float = 0.01) -> Method:
    """Learns, sends and receives A, B and H; lam keeps the correction small."""
    if lam < 0:
        raise FedtriError(f"method_options.lam: expected 0 or more, got {lam}")
    plan = Plan.of(train="ABH", up="ABH", down="ABH")

    def aggregate(state: ServerState, replies: Sequence[Reply]) -> ServerState:
        weights = means.example_weights(replies)

        def solve(group: means.Pairs) -> means.Pair:
            B, A = means.mean_of(group.B, weights), means.mean_of(group.A, weights)
            return B + products.lora_fair_correction(B, A, group.B, group.A, weights, lam), A

        return means.share_pairs(state, replies, solve)

    return Method("lora_fair", PAPER, lambda _: plan, aggregate)
