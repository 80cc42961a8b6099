"""FedProx: FedIT with every client held near what it received, by + μ/2 ‖θ − θ_received‖². arXiv:1812.06127."""

from collections.abc import Sequence
from functools import partial

from fedtri.aggregation import means
from fedtri.errors import FedtriError
from fedtri.messages import Reply
from fedtri.method import Method, Paper, Plan, train_steps
from fedtri.state import ServerState

PAPER = Paper(
    "FedProx",
    "Federated Optimization in Heterogeneous Networks",
    2018,
    "https://arxiv.org/abs/1812.06127",
)


def fedprox(*, mu: float = 0.01) -> Method:
    """Learns, sends and receives A, B and H; mu weighs the pull, over every factor that learns."""
    if mu < 0:
        raise FedtriError(f"method_options.mu: expected 0 or more, got {mu}")
    plan = Plan.of(train="ABH", up="ABH", down="ABH")

    def aggregate(state: ServerState, replies: Sequence[Reply]) -> ServerState:
        return means.share(state, means.mean(replies, frozenset("AB")))

    return Method("fedprox", PAPER, lambda _: plan, aggregate, partial(train_steps, proximal=mu), averages=True)
