"""The adapter of a layer: y = W0 x + s · B C A x with factors stacked over m clients over one copy of W0.

Two more kinds: DoRA, y = M ∘ (W0 + s B C A) x / ‖W0 + s B C A‖ with a norm for each row (arXiv:2402.09353), and HiRA,
y = (W0 + W0 ∘ s B C A) x (openreview.net/forum?id=TwJrTz9cRS). A dense W, where a client has one, adds W x.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D

from fedtri.adapters.initial import block_diagonal
from fedtri.execution.mixed import gradient, product
from fedtri.execution.routing import Routing

Kind = Literal["lora", "dora", "hira"]


class Stacked(nn.Module):
    """A layer that keeps some tensors of every client: one parameter (m, ...) for passes that several clients share,
    and in `own`, while they learn, a parameter a client that is a view of it, so that clients can train apart.
    """

    def __init__(self, routing: Routing) -> None:
        super().__init__()
        self.routing = routing
        self.own: dict[str, list[nn.Parameter]] = {}

    def of(self, name: str) -> Float[Tensor, "batch *shape"]:
        """Each sample's tensor of this name; one broadcast when the batch is of one client."""
        slot = self.routing.single
        if slot is not None:
            return self.at(name, slot)[None]
        if name not in self.own or getattr(self, name).is_cuda:
            return self.routing.pick(getattr(self, name))
        # of the views, since a gradient of the whole stack would reach clients that another thread trains
        parts = [self.at(name, slot).expand(stop - start, *[-1] * (getattr(self, name).dim() - 1))
                 for slot, start, stop in self.routing.runs()]  # fmt: skip
        return torch.cat(parts)

    def at(self, name: str, slot: int) -> Float[Tensor, "*shape"]:
        """One client's tensor of this name."""
        return self.own[name][slot] if name in self.own else getattr(self, name)[slot]


class TriLinear(Stacked):
    """A frozen linear layer with m clients' B·C·A beside it."""

    def __init__(
        self, base: nn.Module, clients: int, rank: int, routing: Routing, *, kind: Kind = "lora", heads: int = 1
    ) -> None:
        super().__init__(routing)
        self.kind, self.dense = kind, dict[int, Tensor]()
        d_out, d_in = shape_of(base)
        weight: Tensor = base.weight  # pyright: ignore[reportAssignmentType]
        like = {"dtype": precision(weight), "device": weight.device}
        self.base = base
        self._plain = type(base) is nn.Linear and weight.dtype == like["dtype"]
        self.A = nn.Parameter(torch.zeros(clients, rank, d_in, **like))
        self.C = nn.Parameter(torch.zeros(clients, rank, rank // heads, **like))
        self.B = nn.Parameter(torch.zeros(clients, d_out, rank, **like))
        if heads > 1:
            self.S = nn.Parameter(torch.ones(clients, heads, **like))
        if kind == "dora":
            self.M = nn.Parameter(torch.ones(clients, d_out, **like))
            self.register_buffer(
                "squares", torch.linalg.vector_norm(weight_of(base).to(**like), dim=1) ** 2, persistent=False
            )
        self.scale: Tensor
        self.squares: Tensor
        self.register_buffer("scale", torch.zeros(clients, **like), persistent=False)

    @property
    def by_client(self) -> bool:
        """Whether each client's part of a batch can go through its own factors, with the frozen layer, in one step."""
        return self._plain and self.kind == "lora" and not self.dense

    def forward(self, x: Float[Tensor, "... d_in"]) -> Float[Tensor, "... d_out"]:
        # a GPU wants few products, a processor plain ones without copies of each sample's factors
        if self.by_client and (self.routing.single is not None or not x.is_cuda):
            return self._by_client(x)
        out = self.base(x)
        rows = self.routing.rows(x).to(self.A.dtype)
        if self.kind == "hira":
            update = self.routing.each(rows, self._hira)
        else:
            h = torch.matmul(rows, self.of("A").mT)  # (batch, tokens, r)
            h = torch.matmul(h, self._core().mT)  # (batch, tokens, r)
            update = torch.matmul(h, self.of("B").mT)  # (batch, tokens, d_out)
        if self.dense:
            update = update + self.routing.each(rows, self._dense)
        if self.kind == "dora":
            return self._dora(out, update)
        return out + update.reshape(out.shape).to(out.dtype)

    def _by_client(self, x: Tensor) -> Tensor:
        """The batch as one matrix, each client's rows of it through its own factors."""
        flat, runs = x.reshape(-1, x.shape[-1]), self.routing.runs()  # (batch · tokens, d_in)
        samples = runs[-1][-1]
        whole = x.shape[0] % samples == 0 or x.shape[:-1] == (1, samples)  # a token a sample in one row of texts
        assert len(runs) == 1 or whole, f"{tuple(x.shape)} is not of {samples} samples"
        each = len(flat) // samples
        bounds = [(start * each, stop * each) for _, start, stop in runs] if len(runs) > 1 else [(0, len(flat))]
        factors = [one for slot, _, _ in runs for one in (self.at("A", slot), self._core_at(slot), self.at("B", slot))]
        y = ByClient.apply(flat, self.base.weight, self.base.bias, bounds, *factors)
        return y.view(*x.shape[:-1], -1)  # pyright: ignore

    def _core(self) -> Float[Tensor, "batch r r"]:
        """s · C of each sample's client."""
        return self._square(self.of("C"), self.of("scale"), self.of("S") if hasattr(self, "S") else None)

    def _core_at(self, slot: int) -> Float[Tensor, "r r"]:
        S = self.at("S", slot)[None] if hasattr(self, "S") else None
        return self._square(self.at("C", slot)[None], self.at("scale", slot)[None], S)[0]

    def _square(self, C: Tensor, scale: Tensor, S: Tensor | None) -> Float[Tensor, "batch r r"]:
        """scale · C, its blocks on the diagonal where it has heads."""
        core = C * scale[:, None, None]
        if S is None:
            return core
        blocks = core.unflatten(1, (S.shape[1], -1)) * S[:, :, None, None]
        return block_diagonal(blocks.flatten(1, 2))

    def _dense(self, slot: int, rows: Tensor) -> Tensor:
        W = self.dense.get(slot)
        return rows.new_zeros(*rows.shape[:2], self.B.shape[1]) if W is None else rows @ W.mT

    def _hira(self, slot: int, rows: Tensor) -> Tensor:
        update = self.at("B", slot) @ self._core_at(slot) @ self.at("A", slot)
        return rows @ (weight_of(self.base).to(rows.dtype) * update).mT

    def _dora(self, out: Tensor, update: Float[Tensor, "batch tokens d_out"]) -> Tensor:
        """M / ‖W‖ · W x + bias; the norm is a constant to the gradient, as in DoRA's section 4.3 and in PEFT.

        ‖w + bᵀCA‖² of a row = ‖w‖² + 2 wᵀ(CA)ᵀb + bᵀ(CA)(CA)ᵀb: no d_out × d_in matrix is built.
        """
        with torch.no_grad():
            B, CA = self.of("B"), self._core() @ self.of("A")  # (batch, d_out, r), (batch, r, d_in)
            cross = weight_of(self.base).to(CA.dtype) @ CA.mT  # (batch, d_out, r)
            squares = self.squares + (B * (2 * cross + B @ (CA @ CA.mT))).sum(-1)
            norm = squares.clamp(min=0).sqrt()  # (batch, d_out)
        gain = (self.of("M") / norm)[:, None]
        bias = getattr(self.base, "bias", None)
        plain = self.routing.rows(out)
        plain = plain if bias is None else plain - bias
        tuned = gain * (plain + update)
        return (tuned if bias is None else tuned + bias).reshape(out.shape).to(out.dtype)


class ByClient(torch.autograd.Function):
    """y = W0 x + b + B C A x, run of rows by run of rows: what is added is added in place, forward and backward."""

    @staticmethod
    def forward(
        ctx: Any, x: Float[Tensor, "n d_in"], W0: Tensor, bias: Tensor | None, bounds: Sequence[tuple[int, int]],
        *factors: Tensor,
    ) -> Float[Tensor, "n d_out"]:  # fmt: skip
        y = product(x, W0, bias).to(x.dtype)
        between = []
        for (start, stop), A, C, B in zip(bounds, factors[::3], factors[1::3], factors[2::3], strict=True):
            h = x[start:stop] @ A.mT
            z = h @ C.mT
            y[start:stop].addmm_(z, B.mT)
            between += [h, z]
        ctx.bounds = bounds
        ctx.save_for_backward(x, W0, *factors, *between)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Float[Tensor, "n d_out"]) -> tuple[Tensor | None, ...]:  # pyright: ignore
        x, W0, *saved = ctx.saved_tensors
        factors, between = saved[: 3 * len(ctx.bounds)], saved[3 * len(ctx.bounds) :]
        wants_x, wants = ctx.needs_input_grad[0], ctx.needs_input_grad[4:]
        dx = gradient(dy, W0).to(dy.dtype) if wants_x else None
        found: list[Tensor | None] = []
        for run, (start, stop) in enumerate(ctx.bounds):
            (A, C, B), (h, z) = factors[3 * run : 3 * run + 3], between[2 * run : 2 * run + 2]
            wants_A, wants_C, wants_B = wants[3 * run : 3 * run + 3]
            part = dy[start:stop]
            dz = part @ B
            dh = dz @ C
            if dx is not None:
                dx[start:stop].addmm_(dh, A)
            found += [
                dh.mT @ x[start:stop] if wants_A else None, dz.mT @ h if wants_C else None,
                part.mT @ z if wants_B else None,
            ]  # fmt: skip
        return (dx, None, None, None, *found)


class StackedLinear(Stacked):
    """A head's linear layer, one for each of m clients."""

    def __init__(self, base: nn.Linear, clients: int, routing: Routing) -> None:
        super().__init__(routing)
        dtype = precision(base.weight)
        self.weight = nn.Parameter(base.weight.detach().to(dtype).expand(clients, -1, -1).clone())
        bias = None if base.bias is None else base.bias.detach().to(dtype)
        self.bias = None if bias is None else nn.Parameter(bias.expand(clients, -1).clone())
        self.shut: Tensor | None = None
        """(m, d_out), -inf for a row that is no class of this client's, 0 for the others; None where all have all."""

    def open(self, slot: int, classes: Tensor | None) -> None:
        """Let a client answer with these rows only; None: with all."""
        if self.shut is None:
            if classes is None:
                return
            self.shut = self.weight.new_zeros(self.weight.shape[:2])
        self.shut[slot] = 0.0 if classes is None else -math.inf
        if classes is not None:
            self.shut[slot, classes] = 0.0

    def forward(self, x: Float[Tensor, "... d_in"]) -> Float[Tensor, "... d_out"]:
        y = torch.matmul(self.routing.rows(x).to(self.weight.dtype), self.of("weight").mT)
        if self.bias is not None:
            y = y + self.of("bias")[:, None]
        if self.shut is not None:
            y = y + self.of("shut")[:, None]
        return y.reshape(*x.shape[:-1], -1)


def precision(weight: Tensor) -> torch.dtype:
    """The number type of what learns beside a weight: float32 where that is kept in fewer bits."""
    return torch.promote_types(weight.dtype, torch.float32)


def shape_of(linear: nn.Module) -> tuple[int, int]:
    """(d_out, d_in) of an nn.Linear, however its weight is kept, or of GPT-2's Conv1D, which keeps it transposed."""
    if isinstance(linear, nn.Linear):
        return linear.out_features, linear.in_features
    weight = linear.weight
    assert isinstance(weight, Tensor)
    columns, rows = weight.shape
    return rows, columns


def plain(module: nn.Module) -> bool:
    """Whether all weights are numbers that one can calculate with, not 8 or 4 bits in a format of their own."""
    return all(value.is_floating_point() for value in module.parameters())


def weight_of(linear: nn.Module) -> Float[Tensor, "d_out d_in"]:
    """W0 as (d_out, d_in), a view where it is kept transposed."""
    weight = linear.weight
    assert isinstance(weight, Tensor)
    return (weight.mT if isinstance(linear, Conv1D) else weight).detach()
