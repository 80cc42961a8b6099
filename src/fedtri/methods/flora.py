"""FLoRA: the clients' pairs are stacked, so their mean product is exact; it joins the base model. arXiv:2409.05976.

W ← W + Σ p_k s_k B_kA_k = W + [p_1s_1B_1 … p_ms_mB_m][A_1; …; A_m]: the weight sits on one side only.
"""

from collections.abc import Callable, Sequence

from fedtri.adapters.layout import Factors
from fedtri.aggregation import means, pairs, products
from fedtri.messages import Reply
from fedtri.method import AdapterSpec, Method, Paper, Plan
from fedtri.state import ServerState

PAPER = Paper(
    "FLoRA",
    "FLoRA: Federated Fine-Tuning Large Language Models with Heterogeneous Low-Rank Adaptations",
    2024,
    "https://arxiv.org/abs/2409.05976",
)


def flora() -> Method:
    """Learns A, B and H, of any ranks, and sends them; receives the dense running total W and H.

    When a new W arrives, and before the first, a client starts with B = 0 and a fresh A, which is drawn for that round
    and client. So the mean product of a round has as many directions as all clients have together.
    """
    plan = Plan.of(train="ABH", up="ABH", down="WH")

    def aggregate(state: ServerState, replies: Sequence[Reply]) -> ServerState:
        total = {}
        for group in pairs.pairs(state, replies):
            left, right = products.stacked(group.B.double(), group.A.double(), means.example_weights(replies))
            total |= pairs.add_dense(state, group, left @ right)
        return means.share(state, total)

    def receive(own: Factors, down: Factors, fresh: Callable[[], Factors]) -> Factors:
        new = any(key.factor == "W" for key in down) or not any(own[key].any() for key in own if key.factor == "B")
        return {**own, **(fresh() if new else {}), **down}

    return Method(
        "flora",
        PAPER,
        lambda _: plan,
        aggregate,
        receive=receive,
        adapter=AdapterSpec(extra="W", mixed_ranks=True, bases=("kaiming", "orthonormal")),
    )
