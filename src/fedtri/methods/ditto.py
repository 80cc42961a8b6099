"""Ditto: FedIT, and beside it each client trains a copy of its own, held near what it received. arXiv:2012.04221.

personal_k = argmin F_k(θ) + λ/2 ‖θ − received‖², over the adapter (and head) alone, never over the model.
"""

from collections.abc import Sequence
from dataclasses import replace

from fedtri.aggregation import means
from fedtri.errors import FedtriError
from fedtri.messages import Reply
from fedtri.method import AdapterSpec, LocalRound, Method, Paper, Plan, Update, train_steps
from fedtri.state import ServerState

PAPER = Paper(
    "Ditto",
    "Ditto: Fair and Robust Federated Learning Through Personalization",
    2020,
    "https://arxiv.org/abs/2012.04221",
)


def ditto(*, lam: float = 0.1) -> Method:
    """Learns, sends and receives A, B and H; the personal copy takes as many steps again and stays home."""
    if lam < 0:
        raise FedtriError(f"method_options.lam: expected 0 or more, got {lam}")
    plan = Plan.of(train="ABH", up="ABH", down="ABH")

    def local_update(local: LocalRound) -> list[Update]:
        updates = train_steps(local)
        copies = [copy or own for copy, own in zip(local.memory("personal"), local.received, strict=True)]
        trained = local.train(copies, proximal=lam, towards=local.received, purpose="personal")
        personal = [one.factors for one in trained]
        local.remember("personal", personal)
        scores = local.evaluate(personal)
        return [
            replace(update, metrics={**update.metrics, **{f"{name}_personal": value for name, value in own.items()}})
            for update, own in zip(updates, scores, strict=True)
        ]

    def aggregate(state: ServerState, replies: Sequence[Reply]) -> ServerState:
        return means.share(state, means.mean(replies, frozenset("AB")))

    adapter = AdapterSpec(personal_copy=True)
    return Method("ditto", PAPER, lambda _: plan, aggregate, local_update, adapter=adapter, averages=True)
