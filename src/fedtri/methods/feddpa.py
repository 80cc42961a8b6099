"""FedDPA: a global adapter A, B that is averaged, and beside it a local one a, b that stays home. arXiv:2403.19211.

y = W0 x + s · B A x + s · b a x. In each round the local adapter trains beside the global one as it was received, which
is frozen; then the global adapter trains alone, from what was received. This is the paper's iterative variant,
FedDPA-T. Left out: FedDPA-F, which trains all local adapters once after the last round, and the weight between
the two adapters, which the paper computes for each test example from its similarity to the training examples. Here
both weigh 1.
"""

from collections.abc import Sequence

import torch

from fedtri.adapters.layout import Factors, only
from fedtri.aggregation import means
from fedtri.messages import Reply
from fedtri.method import AdapterSpec, LocalRound, Method, Paper, Plan, Update
from fedtri.state import ServerState

PAPER = Paper(
    "FedDPA",
    "Dual-Personalizing Adapter for Federated Foundation Models",
    2024,
    "https://arxiv.org/abs/2403.19211",
)

LOCAL = frozenset("ab")


def feddpa() -> Method:
    """Learns A, B, H, a and b; sends and receives A, B and H. A round takes twice the steps of one adapter."""
    plan = Plan.of(train="ABHab", up="ABH", down="ABH")

    def local_update(local: LocalRound) -> list[Update]:
        beside = local.train(local.received, learns=LOCAL, purpose="local adapter")
        alone = local.train([_without_local(own) for own in local.received], learns=local.plan.train - LOCAL)
        kept = [{**one.factors, **only(other.factors, LOCAL)} for one, other in zip(alone, beside, strict=True)]
        return [
            Update(own, {"train_loss": one.loss, **scores})
            for own, one, scores in zip(kept, alone, local.evaluate(kept), strict=True)
        ]

    def aggregate(state: ServerState, replies: Sequence[Reply]) -> ServerState:
        return means.share(state, means.mean(replies, frozenset("AB")))

    adapter = AdapterSpec(extra="ab")
    return Method("feddpa", PAPER, lambda _: plan, aggregate, local_update, adapter=adapter, averages=True)


def _without_local(own: Factors) -> Factors:
    """The client's tensors with b = 0, so that the local adapter adds nothing."""
    return {key: torch.zeros_like(value) if key.factor == "b" else value for key, value in own.items()}
