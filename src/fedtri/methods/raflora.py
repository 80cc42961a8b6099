"""raFLoRA: each rank's slice of the product is averaged over the clients that have it. arXiv:2602.13486.

M = Σ_j Σ_{k: r_k ≥ j} p_k / (Σ_{i: r_i ≥ j} p_i) · s_k B_k[:, j] A_k[j, :]; client k gets the best approximation of M
of rank r_k. With one weight p_k for all slices, as in FlexLoRA, the slices that few clients have fade with every round.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from fedtri.adapters.layout import Key
from fedtri.aggregation import means, pairs, products
from fedtri.messages import Reply
from fedtri.method import AdapterSpec, Method, Paper, Plan
from fedtri.state import ServerState

PAPER = Paper(
    "raFLoRA",
    "Preventing Rank Collapse in Federated Low-Rank Adaptation with Client Heterogeneity",
    2026,
    "https://arxiv.org/abs/2602.13486",
)


def raflora() -> Method:
    """Learns, sends and receives A, B and H, of any ranks; with one rank for all it is flexlora."""
    plan = Plan.of(train="ABH", up="ABH", down="ABH")

    def aggregate(state: ServerState, replies: Sequence[Reply]) -> ServerState:
        weights = means.example_weights(replies)

        def solve(group: pairs.Pairs) -> pairs.Pair:
            own = [reply.up[Key(group.layers[0], "A")].shape[0] for reply in replies]
            shares = slice_weights(weights, own, group.A.shape[2]).to(group.B.dtype)
            one = torch.ones(len(replies), dtype=torch.float64)
            return products.best_low_rank(group.B * shares[:, None], group.A, one, group.A.shape[2])

        return pairs.share_pairs(state, replies, solve)

    adapter = AdapterSpec(mixed_ranks=True)
    return Method("raflora", PAPER, lambda _: plan, aggregate, receive=pairs.revive, adapter=adapter)


def slice_weights(weights: Float[Tensor, "m"], ranks: Sequence[int], largest: int) -> Float[Tensor, "m largest"]:
    """Each client's weight in each rank's slice: 0 where it has none; a slice that somebody has sums to 1."""
    has = torch.arange(largest) < torch.tensor(ranks)[:, None]
    held = weights[:, None] * has
    return held / held.sum(0).clamp(min=torch.finfo(held.dtype).tiny)
