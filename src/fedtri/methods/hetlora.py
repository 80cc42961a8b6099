"""HetLoRA: clients of different rank, zero-padded and averaged with weights ∝ ‖B_kA_k‖_F. arXiv:2401.06432.

w_k = ‖s_kB_kA_k‖_F / Σ_j ‖s_jB_jA_j‖_F in each layer; client k gets the first r_k rows of Ā and columns of B̄.
"""

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from fedtri.adapters.layout import Factors, Key
from fedtri.aggregation import pairs, products
from fedtri.errors import FedtriError
from fedtri.messages import Reply
from fedtri.method import AdapterSpec, LocalRound, Method, Paper, Plan, Update, train_steps
from fedtri.state import ServerState

PAPER = Paper(
    "HetLoRA",
    "Heterogeneous LoRA for Federated Fine-tuning of On-Device Foundation Models",
    2024,
    "https://arxiv.org/abs/2401.06432",
)


def hetlora(*, prune: float | None = None) -> Method:
    """Learns, sends and receives A, B and H, of any ranks; the number of examples plays no part, but for H.

    prune: γ in (0, 1). A client whose last (1 − γ) r pairs have lost norm in its local steps, Σ ‖B_tail A_tail‖_F over
    the layers, gives them up for good: it holds them at 0, and learns and sends zeros in their place. None: no pruning.
    """
    if prune is not None and not 0 < prune < 1:
        raise FedtriError(f"method_options.prune: expected a number between 0 and 1, got {prune}")
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
        "hetlora",
        PAPER,
        lambda _: plan,
        aggregate,
        train_steps if prune is None else partial(_pruning, gamma=prune),
        pairs.revive,
        AdapterSpec(mixed_ranks=True),
    )


RANK = Key("rank", "C")
"""Under which key a client remembers how many pairs it still has."""


def _pruning(local: LocalRound, *, gamma: float) -> list[Update]:
    """Local steps at the rank that each client still has, and the paper's test of whether it needs all of that."""
    ranks = [
        next(value.shape[0] for key, value in own.items() if key.factor == "A") if kept is None else int(kept[RANK])
        for own, kept in zip(local.received, local.memory("pruned"), strict=True)
    ]
    starts = [at_rank(own, rank) for own, rank in zip(local.received, ranks, strict=True)]
    kept = []
    for place, one in enumerate(local.train(starts)):
        smaller = max(1, math.ceil(gamma * ranks[place]))
        lost = tail_norm(one.factors, smaller) < tail_norm(starts[place], smaller)
        ranks[place] = smaller if lost else ranks[place]
        kept.append((at_rank(one.factors, ranks[place]), one.loss))
    local.remember("pruned", [{RANK: torch.tensor(rank)} for rank in ranks])
    scores = local.evaluate([factors for factors, _ in kept])
    return [
        Update(factors, {"train_loss": loss, **own}) for (factors, loss), own in zip(kept, scores, strict=True)
    ]  # fmt: skip


def at_rank(factors: Factors, rank: int) -> dict[Key, Tensor]:
    """The factors with the rows of A and columns of B beyond this rank at 0. Their gradients are then 0, too."""
    result = dict(factors)
    for key, value in factors.items():
        if key.factor in "AB":
            kept = torch.arange(value.shape[0 if key.factor == "A" else 1]) < rank
            result[key] = value * (kept[:, None] if key.factor == "A" else kept)
    return result


def tail_norm(factors: Factors, rank: int) -> float:
    """Σ over the layers of ‖B[:, rank:] A[rank:]‖_F."""
    held = [(factors[Key(key.layer, "B")], value) for key, value in factors.items() if key.factor == "A"]
    return sum(float(products.product_norm(B[:, rank:], A[rank:])) for B, A in held)
