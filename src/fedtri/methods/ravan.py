"""RAVAN: several small cores a layer, each between its own frozen orthonormal A_i and B_i. arXiv:2506.05568.

ΔW = s Σ_i s_i B_iH_iA_i. What travels is s_iH_i, whose mean is exact. One orthonormal A and B of rank h · r with a
block-diagonal C is the same: the rows of A are those of all A_i, C holds the blocks, S the scalars s_i.
"""

from collections.abc import Sequence

from fedtri.aggregation import means
from fedtri.errors import FedtriError
from fedtri.messages import Reply
from fedtri.method import Method, Plan
from fedtri.state import ServerState


def ravan(*, heads: int = 2) -> Method:
    """Learns C, S and H; sends and receives S·C as C, and H. S starts each round at 1, H_i at 0.

    heads: how many cores a layer has; `rank` is their rank in sum, so one of r = rank / heads sends rank · r numbers.
    """
    if heads < 2:
        raise FedtriError(f"method_options.heads: expected at least 2, got {heads}; one head is fed_sb")
    plan = Plan.of(train="CSH", up="CH", down="CH")

    def aggregate(state: ServerState, replies: Sequence[Reply]) -> ServerState:
        return means.share(state, means.mean(replies, frozenset("C")))

    return Method(
        "ravan",
        "arXiv:2506.05568",
        lambda _: plan,
        aggregate,
        basis="orthonormal",
        extra="S",
        heads=heads,
        server_optimizer=True,
    )
