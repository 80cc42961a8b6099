"""Compression of what travels: each tensor's number type, differences to what the other end has, and error feedback.

Where `up` or `down` rounds much (int8, int4, sign), differences travel in both directions. For one tensor of one client
let h be what the client has of it, s the server's own value, and Q(d) what its reader makes of a rounded d.

    down:  d = s − h is sent as Q(d), and both ends set h ← h + Q(d).
    up:    the client trains from h to x; d = x − h + e is sent as Q(d), and e ← d − Q(d) stays with the client.
           The server takes s + Q(d) as the client's tensor.

On the way down s − h always holds all that was rounded off, so the server keeps no residual beside it. It must not
take h + Q(d) as what came up: the next s would be a mean of h, and s − h would be forgotten. On the way up e is the
residual of error feedback (arXiv:1809.07599, arXiv:1901.09847): over the rounds whose replies the server used,

    Σ Q(d) + e = Σ (x − h).

h begins as what both ends derive from the run's seed. A tensor that they cannot derive goes whole at first, in the type
`basis`: a head, and a basis that the clients' gradients give. A tensor that only goes up is sent
whole in the type `up`, without a residual: its values of two rounds need not have to do with each other.
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from fedtri.adapters.layout import Factors, Key
from fedtri.communication.framing import Way
from fedtri.communication.numbers import NUMBERS
from fedtri.errors import FedtriError
from fedtri.method import Plan

LOOKED_AT = 4
"""As many rounds' plans say what travels at all."""


@dataclass(frozen=True)
class Types:
    """The number types of a run; see [wire] in the guide."""

    up: str = "float32"
    down: str = "float32"
    basis: str = "float32"

    @property
    def differ(self) -> bool:
        """Whether differences travel in place of values."""
        return NUMBERS[self.up].lossy or NUMBERS[self.down].lossy


FLOAT32 = Types()


@dataclass(frozen=True)
class Traffic:
    """Which factors of a method both ends follow, and in which types all of them travel."""

    types: Types
    followed: frozenset[str]
    """Those of which both ends know what the client has. Empty where values travel."""
    bases: frozenset[str]
    """Those of a basis that comes down and never learns."""

    @staticmethod
    def of(plan: Callable[[int], Plan], types: Types, bases: frozenset[str] = frozenset()) -> "Traffic":
        """The traffic of a method with this plan; `bases` are the factors of a basis that the server makes."""
        plans = [plan(round) for round in range(LOOKED_AT)]
        down = frozenset[str]().union(*(one.down for one in plans))
        learns = frozenset[str]().union(*(one.train for one in plans))
        return Traffic(types, down if types.differ else frozenset(), bases - learns)

    def ways(self, keys: Iterable[Key], moving: str, known: Collection[Key]) -> dict[Key, Way]:
        """How each of these tensors is written.

        Args:
            keys: The tensors of one message.
            moving: The number type of its direction.
            known: The tensors of which the sender knows what its reader has.
        """
        return {key: self._way(key, moving, known) for key in keys}

    def _way(self, key: Key, moving: str, known: Collection[Key]) -> Way:
        if key.factor not in self.followed:
            return Way(self.types.basis if key.factor in self.bases else moving)
        return Way(moving, delta=True) if key in known else Way(self.types.basis)

    def follows(self, factors: Factors) -> dict[Key, Tensor]:
        """Those of these tensors that both ends follow."""
        return {key: value for key, value in factors.items() if key.factor in self.followed}


def differences(values: Factors, ways: Mapping[Key, Way], reference: Factors) -> dict[Key, Tensor]:
    """What is written of each tensor: the value, or its difference to the reference."""
    return {key: value - reference[key].to(value) if ways[key].delta else value for key, value in values.items()}


def values_of(written: Factors, ways: Mapping[Key, Way], reference: Factors) -> dict[Key, Tensor]:
    """The inverse of `differences`. Raises FedtriError for a difference to a tensor that is not in the reference."""
    if missing := [key for key in written if ways[key].delta and key not in reference]:
        raise FedtriError(
            f"wire: {missing[0].factor} of {missing[0].layer} is a difference, and there is no value to add it to; "
            "give both ends the same configuration"
        )
    return {key: reference[key] + value if ways[key].delta else value for key, value in written.items()}


def with_feedback(written: Factors, lost: Factors, ways: Mapping[Key, Way]) -> tuple[dict[Key, Tensor], Factors]:
    """Error feedback: d + e is sent as Q(d + e), and e' = d + e − Q(d + e) is kept for next time.

    Args:
        written: The tensors d of this message for which errors are kept.
        lost: e of every tensor that was ever sent; a tensor without one has lost nothing.
        ways: How each tensor is written, which says what Q is.

    Returns:
        (d + e, which is to be written; e of every tensor from now on). A tensor that this message leaves out keeps its
        e. Where a number is not finite nothing is added and nothing kept: the server refuses such a reply.
    """
    if not all(bool(value.isfinite().all()) for value in written.values()):
        return dict(written), lost
    sent = {key: value + lost[key].to(value) if key in lost else value for key, value in written.items()}
    now = {key: value - rounded(value, ways[key]) for key, value in sent.items() if NUMBERS[ways[key].numbers].lossy}
    return sent, {**{key: e for key, e in lost.items() if key not in sent}, **now}


def rounded(value: Tensor, way: Way) -> Tensor:
    """What the reader makes of a tensor that is written in this way, without a reference."""
    return NUMBERS[way.numbers].rounded(value)
