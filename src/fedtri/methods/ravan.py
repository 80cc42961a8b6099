"""RAVAN: several small cores a layer, each between its own frozen orthonormal A_i and B_i. arXiv:2506.05568.

ΔW = s Σ_i s_i B_iH_iA_i. What travels is s_iH_i, whose mean is exact. One orthonormal A and B of rank h · r with a
block-diagonal C is the same: the rows of A are those of all A_i, C holds the blocks, S the scalars s_i.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from fedtri.adapters.factors import folded
from fedtri.adapters.layout import Factors
from fedtri.aggregation import means
from fedtri.errors import FedtriError
from fedtri.messages import Reply
from fedtri.method import AdapterSpec, LocalRound, Method, Paper, Plan, Update, train_steps
from fedtri.state import ServerState

PAPER = Paper(
    "RAVAN",
    "Ravan: Multi-Head Low-Rank Adaptation for Federated Fine-Tuning",
    2025,
    "https://arxiv.org/abs/2506.05568",
)


def ravan(*, heads: int = 4) -> Method:
    """Learns C, S and H; sends and receives S·C as C, and H. S starts each round at 1, H_i at 0.

    heads: how many cores a layer has; `rank` is their rank in sum, so one of r = rank / heads sends rank · r numbers.
    """
    if heads < 2:
        raise FedtriError(f"method_options.heads: expected at least 2, got {heads}; one head is fed_sb")
    plan = Plan.of(train="CSH", up="CH", down="CH")

    def aggregate(state: ServerState, replies: Sequence[Reply]) -> ServerState:
        return means.share(state, means.mean(replies, frozenset("C")))

    def local_update(local: LocalRound) -> list[Update]:
        return [replace(update, sent=folded(update.kept)) for update in train_steps(local)]

    def receive(own: Factors, down: Factors, fresh: Callable[[], Factors]) -> Factors:
        """A new core has its scalars in it, so they start again at 1."""
        new = any(key.factor == "C" for key in down)
        ones = {key: torch.ones_like(value) for key, value in own.items() if new and key.factor == "S"}
        return {**own, **ones, **down}

    adapter = AdapterSpec(basis="orthonormal", core=True, extra="S", heads=heads)
    return Method(
        "ravan", PAPER, lambda _: plan, aggregate, local_update, receive, adapter, averages=True, weights="uniform"
    )
