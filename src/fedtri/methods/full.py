"""Full fine-tuning by FedAvg: the whole model learns, travels and is averaged; what adapters save. arXiv:1602.05629."""

from collections.abc import Sequence

from fedtri.aggregation import means
from fedtri.messages import Reply
from fedtri.method import Method, Plan
from fedtri.state import ServerState


def full() -> Method:
    """Learns, sends and receives every parameter of the model (P) and H; one client at a time in memory."""
    plan = Plan.of(train="PH", up="PH", down="PH")

    def aggregate(state: ServerState, replies: Sequence[Reply]) -> ServerState:
        return means.share(state, means.mean(replies, frozenset("P")))

    return Method("full", "arXiv:1602.05629", lambda _: plan, aggregate, extra="P", server_optimizer=True)
