"""What a method is: what travels in each round, how a client trains, and what the server makes of the replies."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

from fedtri.adapters.layout import Factors
from fedtri.messages import Reply
from fedtri.state import ServerState


@dataclass(frozen=True)
class Paper:
    """Where a method was published; `name` is what its paper calls it."""

    name: str
    title: str = ""
    year: int | None = None
    link: str = ""
    """A URL, as https://arxiv.org/abs/2305.05644; empty for baselines that no paper introduced."""


@dataclass(frozen=True)
class Plan:
    """What learns, what goes up and what comes down in one round.

    Of `down`, a client is sent what changed since it was last sent anything: RoLoRA changes one factor a round.
    """

    train: frozenset[str]
    up: frozenset[str]
    down: frozenset[str]
    pooled: bool = False
    """Whether one pseudo-client trains on everyone's data in place of the clients: in simulation only."""

    @staticmethod
    def of(train: str, up: str = "", down: str = "", *, pooled: bool = False) -> "Plan":
        """`Plan.of("ABH", up="A", down="A")`: one letter a factor."""
        return Plan(frozenset(train), frozenset(up), frozenset(down), pooled)


@dataclass(frozen=True)
class AdapterSpec:
    """What the adapter of each layer consists of, and for which kinds of adapter the method is defined."""

    basis: Literal["kaiming", "orthonormal"] = "kaiming"
    """How the initial A (and, for "orthonormal", B) is drawn from the run's seed."""
    extra: str = ""
    """Factors beside A, C, B and H, of S, M, W, a and b; "P" for a method that trains the model itself."""
    heads: int = 1
    """Blocks on the diagonal of C."""
    kinds: tuple[str, ...] = ("lora",)
    """The kinds of adapter that the method is defined for: lora, dora, hira."""
    mixed_ranks: bool = False
    """Whether clients may differ in rank."""


@dataclass(frozen=True)
class Trained:
    """What local training made of one client's tensors, and its mean loss over the steps."""

    factors: Factors
    loss: float


@dataclass(frozen=True)
class Update:
    """What one client's local update ends with."""

    kept: Factors
    """All of the client's own tensors from now on."""
    metrics: Mapping[str, float]
    """What the client reports: "train_loss", and its scores after training."""
    sent: Factors | None = None
    """The tensors of which the plan's `up` leaves home; None: those that are kept."""


@runtime_checkable
class LocalRound(Protocol):
    """One round at home, of one client or of several that share a backbone. Lists run over `clients`, in order."""

    round: int
    plan: Plan
    clients: Sequence[str]
    received: Sequence[Factors]
    """What each client starts the round with: its own tensors, with what came down over them."""

    def train(
        self,
        start: Sequence[Factors],
        *,
        learns: frozenset[str] | None = None,
        proximal: float = 0.0,
        towards: Sequence[Factors] | None = None,
        purpose: str = "",
    ) -> list[Trained]:
        """The configuration's steps of AdamW from `start`, on what the plan lets learn.

        Args:
            start: Each client's tensors before the first step.
            learns: The factors that learn, where these are not the plan's.
            proximal: μ of μ/2 ‖θ − towards‖², added to each client's loss over the factors that learn.
            towards: What the proximal term pulls to; None: `start`.
            purpose: Minibatches are drawn from the run's seed, the round, the client and this word.
        """
        ...

    def evaluate(self, factors: Sequence[Factors]) -> list[dict[str, float]]:
        """Each client's scores on its own test (and validation) split; empty where the run does not score here."""
        ...

    def memory(self, name: str) -> list[Factors | None]:
        """What each client put aside under this name in an earlier round; None where it never did."""
        ...

    def remember(self, name: str, factors: Sequence[Factors]) -> None:
        """Put tensors aside on each client's own disk, for a later round."""
        ...


Aggregate = Callable[[ServerState, Sequence[Reply]], ServerState]
"""(state whose round is the one that closes, replies in the clients' order) to the next state; pure."""
LocalUpdate = Callable[[LocalRound], Sequence[Update]]
Receive = Callable[[Factors, Factors, Callable[[], Factors]], Factors]
"""(the client's own tensors, what came down, a fresh draw of A, C and B for this round) to what it holds now."""
Welcome = Callable[[ServerState], ServerState]


def train_steps(local: LocalRound, *, proximal: float = 0.0) -> list[Update]:
    """The default local update: train from what was received, then score what came of it."""
    trained = local.train(local.received, proximal=proximal)
    scores = local.evaluate([one.factors for one in trained])
    return [
        Update(one.factors, {"train_loss": one.loss, **own}) for one, own in zip(trained, scores, strict=True)
    ]  # fmt: skip


def overwrite(own: Factors, down: Factors, fresh: Callable[[], Factors]) -> Factors:
    """The default way to receive: what came down replaces the client's own tensors of the same key."""
    return {**own, **down}


@dataclass(frozen=True)
class Method:
    """A federated method.

    A third party's method is a function with keyword-only options that returns one of these; see CONTRIBUTING.md.
    """

    name: str
    paper: Paper
    plan: Callable[[int], Plan]
    """What learns and travels in a round, counted from 0."""
    aggregate: Aggregate
    local_update: LocalUpdate = train_steps
    receive: Receive = overwrite
    adapter: AdapterSpec = AdapterSpec()
    welcome: Welcome | None = None
    """Given: clients send a sketch of their data when they first take part, and this is called when sketches came."""
    averages: bool = False
    """Whether what the server shares is a plain weighted mean, so that a server optimiser may follow its direction."""
