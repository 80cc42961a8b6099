"""FedRot-LoRA: each client's pair is rotated to meet the pair last shared, then pairs are averaged. arXiv:2602.23638.

(B_k R)(RᵀA_k) = B_kA_k for every orthogonal R. So two clients may hold one update in different bases, and a mean of
their factors loses it. R_k = argmin ‖RᵀA_k − A‖_F in one round and argmin ‖B_kR − B‖_F in the next (orthogonal
Procrustes), with A and B as last shared.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from fedtri.adapters.layout import Key
from fedtri.aggregation import means, pairs, products
from fedtri.errors import FedtriError
from fedtri.messages import Reply
from fedtri.method import Method, Paper, Plan
from fedtri.state import ServerState

PAPER = Paper(
    "FedRot-LoRA",
    "FedRot-LoRA: Mitigating Rotational Misalignment in Federated LoRA",
    2026,
    "https://arxiv.org/abs/2602.23638",
)

BY = ("alternate", "A", "B", "both")


def fedrot_lora(*, by: str = "alternate", strength: float = 1.0) -> Method:
    """Learns, sends and receives A, B and H. The first round has nothing to align to: it is FedIT's.

    by: What is aligned: A and B in turn ("alternate", the paper), one of them, or both at once.
    strength: λ in (0, 1]: the rotation nearest to (1 − λ) I + λR in place of R.
    """
    if by not in BY:
        raise FedtriError(f"method_options.by: expected one of {', '.join(BY)}, got {by!r}")
    if not 0 < strength <= 1:
        raise FedtriError(f"method_options.strength: expected a number in (0, 1], got {strength}")
    plan = Plan.of(train="ABH", up="ABH", down="ABH")

    def aggregate(state: ServerState, replies: Sequence[Reply]) -> ServerState:
        weights = means.example_weights(replies)
        aligns = {"alternate": "B" if state.round % 2 else "A", "both": "AB"}.get(by, by)

        def solve(group: pairs.Pairs) -> pairs.Pair:
            B, A = group.B, group.A
            if Key(group.layers[0], "B") in state.shared:
                R = _rotation(state, group, aligns, strength)
                B, A = (B.double() @ R).to(B.dtype), (R.mT @ A.double()).to(A.dtype)
            return means.mean_of(B, weights), means.mean_of(A, weights)

        return pairs.share_pairs(state, replies, solve)

    return Method("fedrot_lora", PAPER, lambda _: plan, aggregate)


def _rotation(state: ServerState, group: pairs.Pairs, aligns: str, strength: float) -> Float[Tensor, "layers m r r"]:
    """Each client's R, which turns its pair towards the one that was last shared."""
    before = {f: torch.stack([state.shared[Key(layer, f)] for layer in group.layers]).double()[:, None] for f in aligns}
    agreement = group.A.new_zeros(*group.A.shape[:3], group.A.shape[2], dtype=torch.float64)
    if "A" in before:
        agreement = agreement + group.A.double() @ before["A"].mT
    if "B" in before:
        agreement = agreement + group.B.double().mT @ before["B"]
    if strength == 1:
        return products.procrustes(agreement)
    # a reflection has no path to I: between them lies a matrix without inverse
    R, eye = products.procrustes(agreement, proper=True), torch.eye(agreement.shape[-1], dtype=torch.float64)
    return products.procrustes((1 - strength) * eye + strength * R, proper=True)
