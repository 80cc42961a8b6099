"""FlexLoRA: the mean of the products, cut by SVD to each client's own rank. arXiv:2402.11505.

M = Σ p_k s_k B_kA_k; client k gets the best approximation of M of rank r_k.
"""

from collections.abc import Sequence

from fedtri.aggregation import means, pairs, products
from fedtri.errors import FedtriError
from fedtri.messages import Reply
from fedtri.method import AdapterSpec, Method, Paper, Plan
from fedtri.state import ServerState

PAPER = Paper(
    "FlexLoRA",
    "Federated Fine-tuning of Large Language Models under Heterogeneous Tasks and Client Resources",
    2024,
    "https://arxiv.org/abs/2402.11505",
)


def flexlora(*, align: bool = False, split: str = "balanced") -> Method:
    """Learns, sends and receives A, B and H, of any ranks.

    align: rotate the new pair to the basis of the round before (Procrustes), so that an SVD does not turn the factors
    under the clients' feet; needs one rank for all, as a rotated pair cannot be cut.
    split: how M = UΣVᵀ becomes a pair: B = U√Σ, A = √ΣVᵀ ("balanced"), or B = UΣ, A = Vᵀ ("orthonormal", as in the
    authors' code).
    """
    if split not in ("balanced", "orthonormal"):
        raise FedtriError(f"method_options.split: expected balanced or orthonormal, got {split!r}")
    plan = Plan.of(train="ABH", up="ABH", down="ABH")

    def aggregate(state: ServerState, replies: Sequence[Reply]) -> ServerState:
        weights = means.example_weights(replies)

        def solve(group: pairs.Pairs) -> pairs.Pair:
            B, A = products.best_low_rank(group.B, group.A, weights, group.A.shape[2], balanced=split == "balanced")
            return pairs.aligned(state, group, B, A) if align else (B, A)

        return pairs.share_pairs(state, replies, solve)

    return Method(
        "flexlora",
        PAPER,
        lambda _: plan,
        aggregate,
        receive=pairs.revive,
        adapter=AdapterSpec(kinds=("lora", "dora", "hira"), mixed_ranks=not align),
    )
