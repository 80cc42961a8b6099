"""The tensors of a client: which factors there are, how each is called, and the shapes that both ends derive.

An adapted linear layer computes y = W0 x + s · B C A x with A (r, d_in), C (r, r), B (d_out, r), s = alpha / r. A
second adapter, for methods that keep two, adds s · b a x with a (r, d_in), b (d_out, r).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from torch import Tensor

from fedtri.errors import FedtriError

Factor = Literal["A", "C", "B", "S", "M", "W", "a", "b", "P", "H"]
FACTORS: tuple[Factor, ...] = ("A", "C", "B", "S", "M", "W", "a", "b", "P", "H")
"""A, C, B: the adapter. S: a scalar for each of a core's heads. M: DoRA's magnitudes. W: a dense update added to W0.
a, b: a second adapter. P: a parameter of the backbone itself, where there is no adapter. H: the task head."""


class Key(NamedTuple):
    """One tensor of one client: a layer (or a parameter of the model, for "H" and "P") and the factor."""

    layer: str
    factor: str


Factors = Mapping[Key, Tensor]


def only(factors: Factors, kinds: frozenset[str]) -> dict[Key, Tensor]:
    """The tensors whose factor is one of `kinds`."""
    return {key: value for key, value in factors.items() if key.factor in kinds}


def key_name(key: Key) -> str:
    """The one spelling of a key as a string, for files."""
    return f"{key.factor}:{key.layer}"


def parse_key(name: str) -> Key:
    """The inverse of key_name. Raises FedtriError on anything else."""
    factor, _, layer = name.partition(":")
    if not layer or not factor:
        raise FedtriError(f"tensor name {name!r}: expected FACTOR:LAYER")
    return Key(layer, factor)


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
    """Which of S, M, W, a and b an adapted layer has beside A, C and B."""
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
            beside = {"S": (self.heads,), "M": (d_out,), "W": (d_out, d_in), "a": (rank, d_in), "b": (d_out, rank)}
            table |= {Key(name, factor): beside[factor] for factor in self.extra}
        table |= {Key(name, "P"): shape for name, shape in self.backbone}
        return table | {Key(name, "H"): shape for name, shape in self.head}
