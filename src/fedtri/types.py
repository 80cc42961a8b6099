"""The nouns every other module speaks: factors, plans, tasks, replies, the server's state, methods, transports.

An adapted linear layer computes y = W0 x + s · B C A x with A (r, d_in), C (r, r), B (d_out, r), s = alpha / r.
A method decides which of these factors learn, which travel up, how the server combines them, and which come down.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Int
from torch import Tensor

Factor = Literal["A", "C", "B", "S", "M", "W", "P", "H"]
FACTORS: tuple[Factor, ...] = ("A", "C", "B", "S", "M", "W", "P", "H")
"""A, C, B: the adapter. S: a scalar for each of a core's heads. M: DoRA's magnitudes. W: a dense update added to W0.
P: a parameter of the backbone itself, where there is no adapter. H: the task head."""


class Key(NamedTuple):
    """One tensor of one client: a layer (or a parameter of the model, for "H" and "P") and the factor."""

    layer: str
    factor: str


Factors = Mapping[Key, Tensor]
POOLED = "pooled"
"""The pseudo-client that holds everyone's training data, where a method asks for one."""


def only(factors: Factors, kinds: frozenset[str]) -> dict[Key, Tensor]:
    """The tensors whose factor is one of `kinds`."""
    return {key: value for key, value in factors.items() if key.factor in kinds}


@dataclass(frozen=True)
class Split:
    """Row indices of one client in the pool."""

    train: Int[np.ndarray, "n_train"]
    validation: Int[np.ndarray, "n_validation"]
    test: Int[np.ndarray, "n_test"]


@dataclass(frozen=True)
class Plan:
    """What learns, what goes up and what comes down in one round.

    Of `down`, a client is sent what changed since it was last sent anything: RoLoRA changes one factor a round.
    """

    train: frozenset[str]
    up: frozenset[str]
    down: frozenset[str]

    @staticmethod
    def of(train: str, up: str = "", down: str = "") -> "Plan":
        """`Plan.of("ABH", up="A", down="A")`: one letter a factor."""
        return Plan(frozenset(train), frozenset(up), frozenset(down))


@dataclass(frozen=True)
class Mixture:
    """A Gaussian mixture with diagonal covariance."""

    weights: Float[np.ndarray, "components"]
    means: Float[np.ndarray, "components d"]
    variances: Float[np.ndarray, "components d"]


@dataclass(frozen=True)
class Sketch:
    """What a client says about its data, once: class counts, and a mixture of features for each class large enough."""

    counts: Int[np.ndarray, "classes"]
    mixtures: Mapping[int, Mixture]


Phase = Literal["sketch", "train", "evaluate"]


@dataclass(frozen=True)
class Task:
    """What the server asks of one client: a phase of a round, and the factors coming down with it.

    Plan and seed do not travel: both ends derive them from the method, the run's seed, the round and the client.
    """

    phase: Phase
    round: int
    client: str
    down: Factors


@dataclass(frozen=True)
class Reply:
    """What a client answers: the factors going up, how many training examples it has, metrics, once a sketch."""

    client: str
    round: int
    up: Factors
    num_examples: int
    metrics: Mapping[str, float]
    sketch: Sketch | None = None


@dataclass(frozen=True)
class Layer:
    """An adapted linear layer of the base model."""

    name: str
    d_in: int
    d_out: int


@dataclass(frozen=True)
class Layout:
    """Which tensors a client has and their shapes. Both ends derive it from model and config: no name travels."""

    layers: tuple[Layer, ...]
    head: tuple[tuple[str, tuple[int, ...]], ...]
    backbone: tuple[tuple[str, tuple[int, ...]], ...] = ()
    """The model's own parameters, where these learn in place of an adapter."""
    extra: str = ""
    """Which of S, M and W an adapted layer has beside A, C and B."""
    heads: int = 1
    """C is block-diagonal with this many blocks, kept as the blocks alone, one under the other."""

    @property
    def factors(self) -> frozenset[str]:
        """Every factor a client has."""
        return frozenset("ACBH" + self.extra + ("P" if self.backbone else ""))

    def keys(self, kinds: frozenset[str]) -> list[Key]:
        """All keys of the given factors, factor by factor, in the model's order: the order on the wire."""
        present = kinds & self.factors
        found = [Key(layer.name, f) for f in FACTORS if f in present - {"P", "H"} for layer in self.layers]
        found += [Key(name, "P") for name, _ in self.backbone if "P" in present]
        return found + [Key(name, "H") for name, _ in self.head if "H" in present]

    def shapes(self, rank: int) -> dict[Key, tuple[int, ...]]:
        """The shape of every tensor of a client of this rank."""
        table: dict[Key, tuple[int, ...]] = {}
        for name, d_in, d_out in ((la.name, la.d_in, la.d_out) for la in self.layers):
            table[Key(name, "A")] = (rank, d_in)
            table[Key(name, "C")] = (rank, rank // self.heads)
            table[Key(name, "B")] = (d_out, rank)
            beside = {"S": (self.heads,), "M": (d_out,), "W": (d_out, d_in)}
            table |= {Key(name, factor): beside[factor] for factor in self.extra}
        table |= {Key(name, "P"): shape for name, shape in self.backbone}
        return table | {Key(name, "H"): shape for name, shape in self.head}


@dataclass(frozen=True)
class ServerState:
    """All the server knows after `round` rounds; never mutated."""

    round: int = 0
    shared: Factors = field(default_factory=dict)
    """What everyone is sent; where ranks differ, of the largest rank and its scale, cut to size on the way down."""
    personal: Mapping[str, Factors] = field(default_factory=dict)
    seen: Mapping[str, Factors] = field(default_factory=dict)
    """The last uplink of each client, kept by methods that mix over everyone they have seen."""
    sketches: Mapping[str, Sketch] = field(default_factory=dict)
    data_distance: Float[np.ndarray, "k k"] = field(default_factory=lambda: np.zeros((0, 0)))
    """Distances between the data of the clients in `sketches`, in that order."""
    similarity: Mapping[str, Float[Tensor, "m m"]] = field(default_factory=dict)
    """The last round's matrices ("data", "model", "weights") over sorted(seen), for the report."""
    changed: Mapping[Key, int] = field(default_factory=dict)
    """The round in which each shared tensor last changed."""
    changed_personal: Mapping[str, int] = field(default_factory=dict)
    delivered: Mapping[str, int] = field(default_factory=dict)
    """The round up to which each client has been sent what is its own."""
    ranks: Mapping[str, int] = field(default_factory=dict)
    """Every client's rank, from the configuration and not from the client's word."""
    alpha: float = 1.0
    """The numerator of every client's scale s = alpha / rank."""
    memory: Mapping[str, Factors] = field(default_factory=dict)
    """What a server optimiser keeps from round to round: its moments by name."""

    def scale(self, reply: Reply) -> float:
        """s_k = alpha / rank_k of the client that sent this (accepted) reply; 1 where there is no adapter."""
        rank = next((value.shape[0] for key, value in reply.up.items() if key.factor in "AC"), None)
        rank = self.ranks.get(reply.client, rank)
        return 1.0 if rank is None else self.alpha / rank

    def with_(self, **changes: object) -> "ServerState":
        """A copy with some fields replaced."""
        return replace(self, **changes)  # pyright: ignore[reportArgumentType]


Aggregate = Callable[[ServerState, Sequence[Reply]], ServerState]


@dataclass(frozen=True)
class Personal:
    """A personal copy of what learns, which never travels, held near what was received."""

    proximal: float
    """λ of λ/2 ‖personal − received‖²."""
    pull: float | None = None
    """None: trained beside the shared copy (Ditto). Else what goes up is received + pull · (personal − received)."""


@dataclass(frozen=True)
class Method:
    """A federated method: what travels in each round and what the server makes of it."""

    name: str
    source: str
    plan: Callable[[int], Plan]
    aggregate: Aggregate
    needs_sketch: bool = False
    welcome: Callable[[ServerState], ServerState] = lambda state: state
    """Called when sketches of newcomers have arrived: may give them a first personal factor."""
    proximal: float = 0.0
    """μ of a pull towards what was received, added to every local loss."""
    basis: Literal["kaiming", "orthonormal"] = "kaiming"
    """How the initial A (and, for "orthonormal", B) is drawn from the run's seed."""
    extra: str = ""
    """Factors beside A, C, B and H that a client has, of S, M and W; "P" for a method without adapters."""
    heads: int = 1
    """Blocks on the diagonal of C."""
    adapters: tuple[str, ...] = ("lora",)
    """The kinds of adapter it is defined for."""
    mixed_ranks: bool = False
    """Whether clients may differ in rank."""
    fresh: bool = False
    """Whether a client starts with a new A and B when a new W arrives."""
    pooled: bool = False
    """Whether one pseudo-client trains on everyone's data: a simulation only."""
    personal: Personal | None = None
    """A copy of the adapter for the client itself, beside the shared one."""
    server_optimizer: bool = False
    """Whether what the server shares is an average, so that FedAvgM or FedAdam may follow its direction."""
    optimize: Callable[[ServerState, ServerState], ServerState] = lambda before, after: after
    """The server's optimiser: (state before the round, state with the plain average) to the next state."""


@dataclass(frozen=True)
class Answer:
    """A reply as it came off the wire, with the bytes that were really encoded for it in both directions."""

    reply: Reply
    up: int
    down: int
    seconds: float | None = None
    """From sending the task to reading the reply, where that is measured."""
    retries: int = 0
    """How often the client had to be asked again."""


@dataclass(frozen=True)
class Failure:
    """A client that was asked and has no usable answer, and why, in one line that names it."""

    client: str
    reason: str
    refused: bool = False
    """Whether it did answer, with what cannot be accepted; else it is late, gone, or said that it failed."""
    retries: int = 0


@runtime_checkable
class Transport(Protocol):
    """Carries tasks to clients and replies back; both directions pass through the wire format."""

    def clients(self) -> list[str]:
        """The ids of the clients that can be asked now, sorted; on a network it waits until there are enough."""
        ...

    def exchange(self, tasks: Sequence[Task]) -> Sequence[Answer | Failure]:
        """Ask every task's client; answers in any order, and a failure where there is none or one too many."""
        ...
