"""The adapter of a cohort: y = W0 x + s · B C A x with factors stacked over m clients over one copy of W0.

Each sample of a batch meets its own client's factors; one client is a cohort of one. Clients of smaller rank are
zero-padded: where a row of A and the matching column of B are zero, both gradients are zero, so padding stays zero.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fedtri.errors import FedtriError
from fedtri.seeds import generator
from fedtri.types import Factors, Key, Layer, Layout

STACKED = {"A", "C", "B"}


class Routing:
    """Which client each sample of the current batch belongs to; one object shared by all layers of a cohort."""

    def __init__(self) -> None:
        self.slots: Tensor | None = None
        self.single: int | None = None

    def set(self, slots: Int[Tensor, "batch"]) -> None:
        """Route sample i of the next batches to the factors in slot slots[i]."""
        self.slots = slots
        first = int(slots[0])
        self.single = first if bool((slots == first).all()) else None

    def pick(self, stacked: Float[Tensor, "m *shape"]) -> Float[Tensor, "batch *shape"]:
        """Each sample's own slice of a stacked tensor; one broadcast slice when the batch is of one client."""
        if self.single is not None:
            return stacked[self.single : self.single + 1]
        assert self.slots is not None, "route the batch before the model sees it"
        return stacked.index_select(0, self.slots)

    def rows(self, x: Float[Tensor, "..."]) -> Float[Tensor, "batch tokens d"]:
        """Any activation whose leading dimension is (a multiple of) the batch, as one row of tokens a sample."""
        if self.single is not None:
            return x.reshape(1, -1, x.shape[-1])
        assert self.slots is not None, "route the batch before the model sees it"
        return x.reshape(len(self.slots), -1, x.shape[-1])


class TriLinear(nn.Module):
    """A frozen linear layer with m clients' B·C·A beside it."""

    def __init__(self, base: nn.Module, clients: int, rank: int, routing: Routing) -> None:
        super().__init__()
        d_out, d_in = shape_of(base)
        like = {"dtype": base.weight.dtype, "device": base.weight.device}  # pyright: ignore[reportAttributeAccessIssue]
        self.base, self.routing = base, routing
        self.A = nn.Parameter(torch.zeros(clients, rank, d_in, **like))
        self.C = nn.Parameter(torch.zeros(clients, rank, rank, **like))
        self.B = nn.Parameter(torch.zeros(clients, d_out, rank, **like))
        self.scale: Tensor
        self.register_buffer("scale", torch.zeros(clients, **like), persistent=False)

    def forward(self, x: Float[Tensor, "... d_in"]) -> Float[Tensor, "... d_out"]:
        pick = self.routing.pick
        out = self.base(x)
        h = torch.matmul(self.routing.rows(x), pick(self.A).mT)  # (batch, tokens, r)
        core = pick(self.C) * pick(self.scale)[:, None, None]
        h = torch.matmul(h, core.mT)  # (batch, tokens, r)
        update = torch.matmul(h, pick(self.B).mT)  # (batch, tokens, d_out)
        return out + update.reshape(out.shape)


class StackedLinear(nn.Module):
    """A head's linear layer, one for each of m clients."""

    def __init__(self, base: nn.Linear, clients: int, routing: Routing) -> None:
        super().__init__()
        self.routing = routing
        self.weight = nn.Parameter(base.weight.detach().expand(clients, -1, -1).clone())
        bias = None if base.bias is None else nn.Parameter(base.bias.detach().expand(clients, -1).clone())
        self.bias = bias

    def forward(self, x: Float[Tensor, "... d_in"]) -> Float[Tensor, "... d_out"]:
        y = torch.matmul(self.routing.rows(x), self.routing.pick(self.weight).mT)
        if self.bias is not None:
            y = y + self.routing.pick(self.bias)[:, None]
        return y.reshape(*x.shape[:-1], -1)


def shape_of(linear: nn.Module) -> tuple[int, int]:
    """(d_out, d_in) of an nn.Linear or of GPT-2's Conv1D, which keeps its weight transposed."""
    weight = linear.weight
    assert isinstance(weight, Tensor)
    rows, columns = weight.shape
    return (columns, rows) if isinstance(linear, Conv1D) else (rows, columns)


@dataclass(frozen=True)
class Slot:
    """What makes one client's factors mean what they mean: its rank and its scale s = alpha / rank."""

    rank: int
    scale: float


class Cohort:
    """A model whose chosen layers carry the factors of up to `clients` clients at once.

    The model is changed in place: targets become TriLinear, the linear layers of the head StackedLinear, everything
    else is frozen. Dropout is off for good: a dropout mask would tie a client's result to who shares its batch.
    """

    def __init__(
        self, model: nn.Module, *, targets: Sequence[str], head: Sequence[str], clients: int, rank: int
    ) -> None:
        self.model, self.clients, self.rank = model.eval(), clients, rank
        self.routing = Routing()
        self._slots: dict[int, Slot] = {}
        layers, heads = [], []
        model.requires_grad_(False)
        for name in targets:
            d_out, d_in = shape_of(model.get_submodule(name))
            if rank > min(d_out, d_in):
                raise FedtriError(
                    f"rank: {rank} is larger than layer {name} ({d_out} x {d_in}); use at most {min(d_out, d_in)}"
                )
            layers.append(Layer(name, d_in, d_out))
            model.set_submodule(name, TriLinear(model.get_submodule(name), clients, rank, self.routing))
        for name in head:
            base = model.get_submodule(name)
            assert isinstance(base, nn.Linear)
            heads.append((f"{name}.weight", tuple(base.weight.shape)))
            if base.bias is not None:
                heads.append((f"{name}.bias", tuple(base.bias.shape)))
            model.set_submodule(name, StackedLinear(base, clients, self.routing))
        self.layout = Layout(tuple(layers), tuple(heads))

    def stacked(self, key: Key) -> nn.Parameter:
        """The parameter (m, ...) that holds this tensor of every client."""
        return self.model.get_parameter(key.layer if key.factor == "H" else f"{key.layer}.{key.factor}")

    def layer(self, name: str) -> TriLinear:
        """The adapted layer of this name."""
        module = self.model.get_submodule(name)
        assert isinstance(module, TriLinear)
        return module

    def write(self, slot: int, factors: Factors, rank: int, alpha: float) -> None:
        """Put a client's tensors into a slot, zero-padded to the cohort's rank."""
        self._slots[slot] = Slot(rank, alpha / rank)
        with torch.no_grad():
            for layer in self.layout.layers:
                self.layer(layer.name).scale[slot] = alpha / rank
            for key, value in factors.items():
                target = self.stacked(key)[slot]
                if key.factor in STACKED:
                    target.zero_()
                    target = target[tuple(slice(n) for n in value.shape)]
                target.copy_(value)

    def read(self, slot: int, kinds: frozenset[str]) -> dict[Key, Tensor]:
        """A copy of a client's tensors, at its own rank, on the CPU."""
        shapes = self.layout.shapes(self._slots[slot].rank)
        return {
            key: self.stacked(key).detach()[slot][tuple(slice(n) for n in shapes[key])].cpu().clone()
            for key in self.layout.keys(kinds)
        }

    def train_only(self, kinds: frozenset[str]) -> None:
        """Let these factors learn, with gradient buffers of their own, and freeze the others."""
        for key in self.layout.keys(frozenset("ACBH")):
            parameter = self.stacked(key)
            learns = key.factor in kinds
            parameter.requires_grad_(learns)
            parameter.grad = torch.zeros_like(parameter) if learns else None

    def slices(self, slot: int, kinds: frozenset[str]) -> dict[Key, nn.Parameter]:
        """One client's share of the stacked parameters, as views that an ordinary optimiser can step."""
        views = {}
        for key in self.layout.keys(kinds):
            stack = self.stacked(key)
            views[key] = view = nn.Parameter(stack.data[slot], requires_grad=False)
            view.grad = None if stack.grad is None else stack.grad[slot]
        return views

    def route(self, slots: Iterable[int] | Int[Tensor, "batch"]) -> None:
        """Say which slot each sample of the next batch belongs to."""
        device = next(self.model.parameters()).device
        self.routing.set(torch.as_tensor(slots, dtype=torch.long, device=device))  # pyright: ignore[reportArgumentType]


def initial_factors(
    layout: Layout, head: Factors, *, rank: int, seed: int, basis: str = "kaiming"
) -> dict[Key, Tensor]:
    """What every client starts from, derived from the run's seed and never sent.

    "kaiming": A Kaiming-uniform as in PEFT, C = I, B = 0. "orthonormal": rows of A and columns of B orthonormal,
    C = 0. Either way ΔW = 0. The rows of a smaller rank are the first rows of a larger one.
    """
    factors: dict[Key, Tensor] = {}
    for layer in layout.layers:
        if basis == "orthonormal":
            A = _orthonormal(layer.d_in, rank, generator(seed, "A", layer.name)).mT.contiguous()
            B = _orthonormal(layer.d_out, rank, generator(seed, "B", layer.name))
            C = torch.zeros(rank, rank)
        else:
            A, B, C = torch.empty(rank, layer.d_in), torch.zeros(layer.d_out, rank), torch.eye(rank)
            nn.init.kaiming_uniform_(A, a=math.sqrt(5), generator=generator(seed, "A", layer.name))
        factors |= {Key(layer.name, "A"): A, Key(layer.name, "C"): C, Key(layer.name, "B"): B}
    return factors | dict(head)


def _orthonormal(d: int, rank: int, rng: torch.Generator) -> Float[Tensor, "d rank"]:
    return torch.linalg.qr(torch.randn(d, rank, generator=rng, dtype=torch.float64)).Q.float()


def effective_update(factors: Mapping[Key, Tensor], layer: str, scale: float) -> Float[Tensor, "d_out d_in"]:
    """ΔW = s · B C A of one client's layer, dense: for tests and for merging, never for the server."""
    A, C, B = (factors[Key(layer, f)] for f in "ACB")
    return scale * (B @ C @ A)
