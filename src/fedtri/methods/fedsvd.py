"""FedSVD: B learns; the server refactors the mean of B A by an SVD, so that A = Vᵀ. arXiv:2505.12805.

B̄A = UΣVᵀ, then B ← UΣ and A ← Vᵀ. The rows of Vᵀ are a rotation of those of A, as long as A has orthonormal rows:
B̄ = UΣWᵀ gives Vᵀ = WᵀA. So A stays frozen as it was drawn, and the rotation travels in its place, as C = Wᵀ: r² numbers
a layer instead of r · d_in, and the server never needs A.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fedtri.adapters.layout import Key
from fedtri.aggregation import means
from fedtri.errors import FedtriError
from fedtri.messages import Reply
from fedtri.method import AdapterSpec, Method, Paper, Plan
from fedtri.state import ServerState

PAPER = Paper(
    "FedSVD",
    "FedSVD: Adaptive Orthogonalization for Private Federated Learning with LoRA",
    2025,
    "https://arxiv.org/abs/2505.12805",
)


def fedsvd(*, every: int = 1) -> Method:
    """Learns and sends B and H; receives B, H and the rotation C of the frozen A.

    every: The server refactors in every round that is a multiple of this; in the others it shares the mean of B.
    """
    if every < 1:
        raise FedtriError(f"method_options.every: expected at least 1, got {every}")
    plan = Plan.of(train="BH", up="BH", down="BCH")

    def aggregate(state: ServerState, replies: Sequence[Reply]) -> ServerState:
        averaged = means.mean(replies, frozenset("B"))
        if state.round % every:
            return means.share(state, averaged)
        shared: dict[Key, Tensor] = {}
        for key, B in averaged.items():
            core = Key(key.layer, "C")
            product = B.double() if core not in state.shared else B.double() @ state.shared[core].double()
            U, S, Wh = torch.linalg.svd(product, full_matrices=False)
            shared |= {key: (U * S).to(B.dtype), core: Wh.to(B.dtype)}
        return means.share(state, shared)

    adapter = AdapterSpec(basis="orthonormal", bases=("orthonormal", "weights", "gradient"))
    return Method("fedsvd", PAPER, lambda _: plan, aggregate, adapter=adapter)
