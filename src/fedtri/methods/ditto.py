"""Ditto: FedIT, and beside it each client trains a copy of its own, held near what it received. arXiv:2012.04221.

personal_k = argmin F_k(θ) + λ/2 ‖θ − received‖², over the adapter (and head) alone, never over the model.
"""

from collections.abc import Sequence

from fedtri.aggregation import means
from fedtri.errors import FedtriError
from fedtri.messages import Reply
from fedtri.method import Method, Personal, Plan
from fedtri.state import ServerState


def ditto(*, lam: float = 0.1) -> Method:
    """Learns, sends and receives A, B and H; the personal copy takes as many steps again and stays home."""
    if lam < 0:
        raise FedtriError(f"method_options.lam: expected 0 or more, got {lam}")
    plan = Plan.of(train="ABH", up="ABH", down="ABH")

    def aggregate(state: ServerState, replies: Sequence[Reply]) -> ServerState:
        return means.share(state, means.mean(replies, frozenset("AB")))

    return Method("ditto", "arXiv:2012.04221", lambda _: plan, aggregate, personal=Personal(lam), server_optimizer=True)
