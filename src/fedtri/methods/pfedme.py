"""pFedMe: a personal copy near what was received; what goes up is a step towards that copy. arXiv:2006.08848.

personal_k ≈ argmin F_k(θ) + λ/2 ‖θ − received‖²; sent_k = received − ηλ (received − personal_k), pull = ηλ.
"""

from collections.abc import Sequence

from fedtri.aggregation import means
from fedtri.errors import FedtriError
from fedtri.messages import Reply
from fedtri.method import Method, Personal, Plan
from fedtri.state import ServerState


def pfedme(*, lam: float = 0.1, pull: float = 0.8) -> Method:
    """Learns, sends and receives A, B and H; the personal copy, of the adapter and head alone, stays home.

    A round solves for the personal copy once. The paper's 20 local rounds of ηλ = 0.075 move what is sent 1 −
    0.925²⁰ = 0.79 of the way to a personal copy that stands still: the default of pull.
    """
    if lam < 0:
        raise FedtriError(f"method_options.lam: expected 0 or more, got {lam}")
    if not 0 < pull <= 1:
        raise FedtriError(f"method_options.pull: expected a number in (0, 1], got {pull}")
    plan = Plan.of(train="ABH", up="ABH", down="ABH")

    def aggregate(state: ServerState, replies: Sequence[Reply]) -> ServerState:
        return means.share(state, means.mean(replies, frozenset("AB")))

    return Method(
        "pfedme", "arXiv:2006.08848", lambda _: plan, aggregate, personal=Personal(lam, pull), server_optimizer=True
    )
