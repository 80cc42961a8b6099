"""What travels between the server and a client: requests, replies, sketches, and what became of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Int

from fedtri.adapters.layout import Factors
from fedtri.metrics import Phase

POOLED = "(pooled)"
"""The pseudo-client that holds everyone's training data, where a method asks for one. No client can have this name:
a natural client's has every bracket as %28 and %29, a network's takes letters, digits, ".", "_" and "-"."""


@dataclass(frozen=True)
class Mixture:
    """A Gaussian mixture with diagonal covariance."""

    weights: Float[np.ndarray, "components"]
    means: Float[np.ndarray, "components d"]
    variances: Float[np.ndarray, "components d"]


@dataclass(frozen=True)
class Sketch:
    """A summary of a client's data, sent once: class counts, and a mixture of features for each large enough class."""

    counts: Int[np.ndarray, "classes"]
    mixtures: Mapping[int, Mixture]


@dataclass(frozen=True)
class Held:
    """What a client has of the server, as far as both ends know: it answered the last message that changed it."""

    factors: Factors = field(default_factory=dict)
    """The tensors that it was sent, as it read them. Kept only where the wire sends differences."""
    rounds: int = 0
    """The number of the last round, counted from 1, whose reply the server used; 0: none."""


@dataclass(frozen=True)
class Request:
    """What the server asks of one client: a phase of a round, and the factors that it sends down.

    Plan and seed do not travel. Both ends derive them from the method, the run's seed, the round and the client.
    """

    phase: Phase
    round: int
    client: str
    down: Factors
    base: Held | None = None
    """What the client has already; None: nothing, so that all it needs is in `down`."""
    values: Factors = field(default_factory=dict)
    """The server's own values of what may come up. A difference in the reply is added to them."""


@dataclass(frozen=True)
class Reply:
    """What a client answers: the factors that it sends up, its number of training examples, its metrics.

    The reply to a "sketch" request also holds a sketch.
    """

    client: str
    round: int
    up: Factors
    num_examples: int
    metrics: Mapping[str, float]
    sketch: Sketch | None = None


@dataclass(frozen=True)
class Answer:
    """A decoded reply, with the bytes that were encoded: `up` for the reply, `down` for the request."""

    reply: Reply
    up: int
    down: int
    seconds: float | None = None
    """From sending the request to reading the reply, where that is measured."""
    retries: int = 0
    """How often the client had to be asked again."""
    held: Held | None = None
    """What the client has of the server from now on."""


@dataclass(frozen=True)
class Failure:
    """A client that was asked but gave no usable answer. `reason` is one line that names the client."""

    client: str
    reason: str
    refused: bool = False
    """True: the client answered, but the answer cannot be used. False: it is late, gone, or said that it failed."""
    retries: int = 0
    behind: bool = False
    """True: the client no longer has what it was sent before, and must be sent all it needs."""


@runtime_checkable
class Transport(Protocol):
    """Carries requests to clients and replies back; both directions pass through the codec, which checks them."""

    def clients(self) -> list[str]:
        """The ids of the clients that can be asked now, sorted; on a network it waits until there are enough."""
        ...

    def exchange(self, requests: Sequence[Request]) -> Sequence[Answer | Failure]:
        """Ask the client of every request. Answers, which can be used, come in any order; each request that brings none
        gives a failure, and so does a further answer to one request.
        """
        ...
