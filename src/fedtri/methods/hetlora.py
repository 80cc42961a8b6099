"""HetLoRA: clients of different rank, zero-padded and averaged with weights ∝ ‖B_kA_k‖_F. arXiv:2401.06432.

w_k = ‖s_kB_kA_k‖_F / Σ_j ‖s_jB_jA_j‖_F in each layer; client k gets the first r_k rows of Ā and columns of B̄.
"""

from collections.abc import Sequence

import torch

from fedtri.aggregation import pairs, products
from fedtri.messages import Reply
from fedtri.method import AdapterSpec, Method, Paper, Plan
from fedtri.state import ServerState

PAPER = Paper(
    "HetLoRA",
    "Heterogeneous LoRA for Federated Fine-tuning of On-Device Foundation Models",
    2024,
    "https://arxiv.org/abs/2401.06432",
)


def hetlora() -> Method:
    """Learns, sends and receives A, B and H, of any ranks; the number of examples plays no part, but for H."""
    plan = Plan.of(train="ABH", up="ABH", down="ABH")

    def aggregate(state: ServerState, replies: Sequence[Reply]) -> ServerState:
        def solve(group: pairs.Pairs) -> pairs.Pair:
            norms = products.product_norm(group.B, group.A)  # (layers, m)
            total = norms.sum(1, keepdim=True)
            weights = torch.where(total > 0, norms / total, 1 / len(replies))
            B, A = (torch.einsum("lk,lkab->lab", weights, X.double()).to(X.dtype) for X in (group.B, group.A))
            return B, A

        return pairs.share_pairs(state, replies, solve)

    return Method(
        "hetlora", PAPER, lambda _: plan, aggregate, receive=pairs.revive, adapter=AdapterSpec(mixed_ranks=True)
    )
