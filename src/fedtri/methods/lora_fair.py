"""LoRA-FAIR: the means of A and B, B corrected so that their product points where the mean product does.

ΔB minimises 1 − cos(Σ p_k B_kA_k, (B̄ + ΔB)Ā) + λ‖ΔB‖_F; clients get back Ā and B̄ + ΔB. arXiv:2411.14961.
"""

from collections.abc import Sequence

from fedtri import combine, linalg
from fedtri.errors import FedtriError
from fedtri.types import Method, Plan, Reply, ServerState


def lora_fair(*, lam: float = 0.01) -> Method:
    """Learns, sends and receives A, B and H; lam keeps the correction small."""
    if lam < 0:
        raise FedtriError(f"method_options.lam: expected 0 or more, got {lam}")
    plan = Plan.of(train="ABH", up="ABH", down="ABH")

    def aggregate(state: ServerState, replies: Sequence[Reply]) -> ServerState:
        weights = combine.example_weights(replies)

        def solve(group: combine.Pairs) -> combine.Pair:
            B, A = combine.mean_of(group.B, weights), combine.mean_of(group.A, weights)
            return B + linalg.lora_fair_correction(B, A, group.B, group.A, weights, lam), A

        return combine.share_pairs(state, replies, solve)

    return Method("lora_fair", "arXiv:2411.14961", lambda _: plan, aggregate)
