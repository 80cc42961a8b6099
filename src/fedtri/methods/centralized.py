"""Centralized: one pseudo-client trains on everyone's data; the ceiling. A simulation: the data leave their owners."""

from collections.abc import Sequence

from fedtri.aggregation import means
from fedtri.messages import Reply
from fedtri.method import AdapterSpec, Method, Paper, Plan
from fedtri.state import ServerState

PAPER = Paper("Centralized")


def centralized() -> Method:
    """Learns A, B and H on the pooled training data; every client is evaluated with the result."""
    plan = Plan.of(train="ABH", up="ABH", down="ABH", pooled=True)

    def aggregate(state: ServerState, replies: Sequence[Reply]) -> ServerState:
        return means.share(state, means.mean(replies, frozenset("AB")))

    adapter = AdapterSpec(bases=("kaiming", "orthonormal", "weights"))
    return Method("centralized", PAPER, lambda _: plan, aggregate, adapter=adapter)
