"""Defines a method: what travels in each round, how a client trains, and how the server combines the replies."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

from fedtri.adapters.initial import BASES, Basis
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
    """A URL such as https://arxiv.org/abs/2305.05644; empty for a baseline that no paper introduced."""


@dataclass(frozen=True)
class Plan:
    """What learns, what goes up and what comes down in one round.

    A client is sent only those tensors of `down` that changed since it was last sent anything. RoLoRA, for example,
    changes one factor a round.
    """

    train: frozenset[str]
    up: frozenset[str]
    down: frozenset[str]
    pooled: bool = False
    """Whether one pseudo-client trains on all clients' data, instead of the clients. Possible in simulation only."""

    @staticmethod
    def of(train: str, up: str = "", down: str = "", *, pooled: bool = False) -> "Plan":
        """A plan from strings with one letter for each factor: `Plan.of("ABH", up="A", down="A")`."""
        return Plan(frozenset(train), frozenset(up), frozenset(down), pooled)


@dataclass(frozen=True)
class AdapterSpec:
    """What the adapter of each layer consists of, and for which kinds of adapter the method is defined."""

    basis: Basis = "kaiming"
    """Where A comes from, and B where it is a basis too; see `fedtri.adapters.initial`."""
    core: bool = False
    """Whether A and B are both a basis and C starts at 0. Otherwise B starts at 0, and C at the identity."""
    bases: tuple[Basis, ...] = BASES
    """The bases that a run may choose for the method."""
    extra: str = ""
    """Factors that the method has besides A, C, B and H: letters of S, M, W, a, b. "P": it trains the model itself."""
    heads: int = 1
    """The number of blocks on the diagonal of C."""
    kinds: tuple[str, ...] = ("lora",)
    """The kinds of adapter that the method is defined for: lora, dora, hira."""
    mixed_ranks: bool = False
    """Whether clients may differ in rank."""
    personal_copy: bool = False
    """Whether a client keeps a second adapter and head at home, under `LocalRound.remember("personal", …)`, and reports
    its scores as NAME_personal."""
    learning_rates: Mapping[str, float] = field(default_factory=dict)
    """The learning rate of a factor, by its letter, where it wants one of its own: a core C wants a larger one than A
    and B. The configuration's [optimizer.learning_rates] wins."""

    @property
    def from_basis(self) -> frozenset[str]:
        """The factors that come from the basis."""
        return frozenset("AB" if self.core else "A")


@dataclass(frozen=True)
class Trained:
    """One client's tensors after local training, and its mean loss over the steps."""

    factors: Factors
    loss: float


@dataclass(frozen=True)
class Update:
    """The result of one client's local update."""

    kept: Factors
    """All tensors that the client keeps for the next round."""
    metrics: Mapping[str, float]
    """What the client reports: "train_loss", and its scores after training."""
    sent: Factors | None = None
    """The tensors from which the plan's `up` is sent; None: from those that are kept."""


@runtime_checkable
class LocalRound(Protocol):
    """One round at the clients' side, for one client or for several that share a backbone.

    Every list has one item for each of `clients`, in their order.
    """

    @property
    def round(self) -> int:
        """The round, counted from 0."""
        ...

    @property
    def plan(self) -> Plan:
        """The method's plan of this round."""
        ...

    @property
    def clients(self) -> Sequence[str]:
        """The clients that train here in this round."""
        ...

    @property
    def received(self) -> Sequence[Factors]:
        """What each client starts the round with: its own tensors, with what came down over them."""
        ...

    def train(
        self,
        start: Sequence[Factors],
        *,
        learns: frozenset[str] | None = None,
        proximal: float = 0.0,
        towards: Sequence[Factors] | None = None,
        purpose: str = "",
    ) -> list[Trained]:
        """Train each client from `start` by AdamW, for as many steps as the configuration says.

        Args:
            start: Each client's tensors before the first step.
            learns: The factors that learn; None: those of the plan.
            proximal: μ of μ/2 ‖θ − towards‖², added to each client's loss over the factors that learn.
            towards: What the proximal term pulls to; None: `start`.
            purpose: Minibatches are drawn from the run's seed, the round, the client and this word.
                A second training in a round sees other minibatches if it gives another word.
        """
        ...

    def evaluate(self, factors: Sequence[Factors]) -> list[dict[str, float]]:
        """Each client's scores on its own test (and validation) split; empty if this round is not scored."""
        ...

    def memory(self, name: str) -> list[Factors | None]:
        """What each client stored under this name in an earlier round; None for a client that stored nothing."""
        ...

    def remember(self, name: str, factors: Sequence[Factors]) -> None:
        """Store tensors under this name on each client's own disk, for a later round."""
        ...


Weights = Literal["examples", "uniform"]
"""How clients count in a mean: p_k = n_k / Σn, or p_k = 1/m."""

Aggregate = Callable[[ServerState, Sequence[Reply]], ServerState]
"""(state, replies in the clients' order) to the next state. A pure function. `state.round` is the round that closes."""
LocalUpdate = Callable[[LocalRound], Sequence[Update]]
"""(one round of some clients) to one Update for each client, in their order."""
Receive = Callable[[Factors, Factors, Callable[[], Factors]], Factors]
"""(the client's own tensors, what came down, a function that draws fresh A, C and B) to the tensors it starts from."""
Welcome = Callable[[ServerState], ServerState]
"""(state with new sketches) to the next state. A pure function."""


def train_steps(local: LocalRound, *, proximal: float = 0.0) -> list[Update]:
    """The default local update: train from what was received, then score the result.

    Args:
        local: The round of these clients.
        proximal: μ of the proximal term μ/2 ‖θ − received‖²; 0: none.
    """
    trained = local.train(local.received, proximal=proximal)
    scores = local.evaluate([one.factors for one in trained])
    return [
        Update(one.factors, {"train_loss": one.loss, **own}) for one, own in zip(trained, scores, strict=True)
    ]  # fmt: skip


def overwrite(own: Factors, down: Factors, fresh: Callable[[], Factors]) -> Factors:
    """The default way to receive: what came down replaces the client's own tensors of the same key.

    `fresh` draws this round's fresh A, C and B; the default does not use it.
    """
    return {**own, **down}


@dataclass(frozen=True)
class Method:
    """A federated method.

    A method is written as a function with keyword-only options that returns a Method. It may stand outside the package:
    see CONTRIBUTING.md.
    """

    name: str
    paper: Paper
    plan: Callable[[int], Plan]
    """(round, counted from 0) to what learns and travels in it."""
    aggregate: Aggregate
    local_update: LocalUpdate = train_steps
    receive: Receive = overwrite
    adapter: AdapterSpec = AdapterSpec()
    welcome: Welcome | None = None
    """If given, clients send a sketch when they first take part; then this is called with the new state."""
    averages: bool = False
    """Whether the server shares a plain weighted mean. Only then may a server optimiser follow it."""
    weights: Weights = "examples"
    """How clients count, as the paper or its authors' code has it. The configuration's `weights` overrides it."""

    def described(self) -> dict[str, Any]:
        """Its name and paper as plain values, for a run directory."""
        return {"name": self.name, "paper": asdict(self.paper)}
