"""pFedMe: a personal copy near what was received; what goes up is a step towards that copy. arXiv:2006.08848.

personal_k ≈ argmin F_k(θ) + λ/2 ‖θ − received‖²; sent_k = received − ηλ (received − personal_k), pull = ηλ;
shared ← (1 − β) shared + β Σ p_k sent_k.
"""

from collections.abc import Sequence

from fedtri.adapters.layout import Factors
from fedtri.aggregation import means
from fedtri.errors import FedtriError
from fedtri.messages import Reply
from fedtri.method import AdapterSpec, LocalRound, Method, Paper, Plan, Update
from fedtri.state import ServerState

PAPER = Paper(
    "pFedMe",
    "Personalized Federated Learning with Moreau Envelopes",
    2020,
    "https://arxiv.org/abs/2006.08848",
)


def pfedme(*, lam: float = 15.0, pull: float = 0.8, beta: float = 1.0) -> Method:
    """Learns, sends and receives A, B and H; the personal copy, of the adapter and head alone, stays home.

    A round solves for the personal copy once. The paper's 20 local rounds of ηλ = 0.075 move what is sent 1 −
    0.925²⁰ = 0.79 of the way to a personal copy that stands still: the default of pull. lam: 15 to 30 in
    the authors' code. beta: 1 or 2 there; above 1 the server goes beyond the mean, but in the first round.
    """
    if lam < 0:
        raise FedtriError(f"method_options.lam: expected 0 or more, got {lam}")
    if not 0 < pull <= 1:
        raise FedtriError(f"method_options.pull: expected a number in (0, 1], got {pull}")
    if not beta > 0:
        raise FedtriError(f"method_options.beta: expected a number above 0, got {beta}")
    plan = Plan.of(train="ABH", up="ABH", down="ABH")

    def local_update(local: LocalRound) -> list[Update]:
        trained = local.train(local.received, proximal=lam)
        personal = [one.factors for one in trained]
        local.remember("personal", personal)
        updates = []
        for start, one, scores in zip(local.received, trained, local.evaluate(personal), strict=True):
            named = {f"{name}_personal": value for name, value in scores.items()}
            metrics = {"train_loss": one.loss, **scores, **named}
            updates.append(Update(_towards(start, one.factors, pull, local.plan.train), metrics))
        return updates

    def aggregate(state: ServerState, replies: Sequence[Reply]) -> ServerState:
        averaged = means.mean(replies, frozenset("ABH"))
        mixed = {
            key: value + (beta - 1) * (value - state.shared[key]) if key in state.shared else value
            for key, value in averaged.items()
        }
        return means.share(state, mixed)

    adapter = AdapterSpec(personal_copy=True)
    return Method("pfedme", PAPER, lambda _: plan, aggregate, local_update, adapter=adapter, averages=True)


def _towards(start: Factors, personal: Factors, pull: float, learns: frozenset[str]) -> Factors:
    """start + pull · (personal − start) of the factors that learn."""
    return {
        key: start[key] + pull * (value - start[key]) if key.factor in learns else value
        for key, value in personal.items()
    }
