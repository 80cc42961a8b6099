"""Full fine-tuning by FedAvg: the whole model learns, travels and is averaged; what adapters save. arXiv:1602.05629."""

from collections.abc import Sequence

from fedtri.aggregation import means
from fedtri.messages import Reply
from fedtri.method import AdapterSpec, Method, Paper, Plan
from fedtri.state import ServerState

PAPER = Paper(
    "Full fine-tuning",
    "Communication-Efficient Learning of Deep Networks from Decentralized Data",
    2016,
    "https://arxiv.org/abs/1602.05629",
)


def full() -> Method:
    """Learns, sends and receives every parameter of the model (P) and H; one client at a time in memory."""
    plan = Plan.of(train="PH", up="PH", down="PH")

    def aggregate(state: ServerState, replies: Sequence[Reply]) -> ServerState:
        return means.share(state, means.mean(replies, frozenset("P")))

    return Method("full", PAPER, lambda _: plan, aggregate, adapter=AdapterSpec(extra="P", bases=()), averages=True)
