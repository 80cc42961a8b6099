"""The adapter of a cohort: y = W0 x + s · B C A x with factors stacked over m clients over one copy of W0.

Two more kinds: DoRA, y = M ∘ (W0 + s B C A) x / ‖W0 + s B C A‖ with a norm for each row (arXiv:2402.09353), and HiRA,
y = (W0 + W0 ∘ s B C A) x (openreview.net/forum?id=TwJrTz9cRS). A dense W, where a client has one, adds W x.

Each sample of a batch meets its own client's factors; one client is a cohort of one. Clients of smaller rank are
zero-padded: where a row of A and the matching column of B are zero, both gradients are zero, so padding stays zero.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear
from transformers.pytorch_utils import Conv1D

from fedtri import packing, prefix, trim
from fedtri.errors import FedtriError
from fedtri.recompute import Recomputation
from fedtri.routing import Routing
from fedtri.seeds import generator
from fedtri.types import Factors, Key, Layer, Layout

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
        return self.routing.pick(getattr(self, name)) if slot is None else self.at(name, slot)[None]

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

    def forward(self, x: Float[Tensor, "... d_in"]) -> Float[Tensor, "... d_out"]:
        slot, ordinary = self.routing.single, self.kind == "lora" and type(self.base) is nn.Linear and not self.dense
        if slot is not None and ordinary and x.dtype == self.base.weight.dtype == self.A.dtype:
            return self._alone(x, self.base, slot)
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

    def _alone(self, x: Tensor, base: nn.Linear, slot: int) -> Tensor:
        """One client's batch as plain matrices."""
        flat = x.reshape(-1, x.shape[-1])  # (batch · tokens, d_in)
        args = base.weight, base.bias, self.at("A", slot), self._core_at(slot), self.at("B", slot)
        return OneClient.apply(flat, *args).view(*x.shape[:-1], -1)  # pyright: ignore

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


class OneClient(torch.autograd.Function):
    """y = W0 x + b + B C A x of one client: what is added is added in place, forward and backward."""

    @staticmethod
    def forward(
        ctx: Any, x: Float[Tensor, "n d_in"], W0: Tensor, bias: Tensor | None, A: Tensor, C: Tensor, B: Tensor
    ) -> Float[Tensor, "n d_out"]:
        h = x @ A.mT
        z = h @ C.mT
        ctx.save_for_backward(x, W0, A, C, B, h, z)
        return linear(x, W0, bias).addmm_(z, B.mT)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Float[Tensor, "n d_out"]) -> tuple[Tensor | None, ...]:
        x, W0, A, C, B, h, z = ctx.saved_tensors
        wants_x, _, _, wants_A, wants_C, wants_B = ctx.needs_input_grad
        dz = dy @ B
        dh = dz @ C
        return (
            (dy @ W0).addmm_(dh, A) if wants_x else None, None, None,
            dh.mT @ x if wants_A else None, dz.mT @ h if wants_C else None, dy.mT @ z if wants_B else None,
        )  # fmt: skip


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


def block_diagonal(blocks: Float[Tensor, "*batch r b"]) -> Float[Tensor, "*batch r r"]:
    """The square matrix with these blocks, given one under the other, along its diagonal."""
    r, b = blocks.shape[-2:]
    eye = torch.eye(r // b, dtype=blocks.dtype, device=blocks.device)
    spread = blocks.unflatten(-2, (r // b, b))[..., None, :] * eye[:, None, :, None]  # (..., heads, b, heads, b)
    return spread.flatten(-2).flatten(-3, -2)


@dataclass(frozen=True)
class Slot:
    """What makes one client's factors mean what they mean: its rank, its scale s = alpha / rank, and its classes."""

    rank: int
    scale: float
    classes: Tensor | None = None
    """The rows of the head's last layer that it has; None: all."""


class Cohort:
    """A model whose chosen layers carry the factors of up to `clients` clients at once.

    The model is changed in place: targets become TriLinear, the linear layers of the head StackedLinear, everything
    else is frozen. Dropout is off for good: a dropout mask would tie a client's result to who shares its batch.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        targets: Sequence[str],
        head: Sequence[str],
        clients: int,
        rank: int,
        kind: Kind = "lora",
        extra: str = "",
        heads: int = 1,
        checkpointing: bool = False,
    ) -> None:
        self.model, self.clients, self.rank = model.eval(), clients, rank
        self.kind, self.routing = kind, Routing()
        self._last = head[-1] if head else None
        self._slots: dict[int, Slot] = {}
        layers, head_shapes = [], []
        self._quantised = [layer for layer in model.modules() if isinstance(layer, nn.Linear) and not plain(layer)]
        for layer in self._quantised:  # in evaluation mode bitsandbytes repacks weights so that no gradient passes
            layer.training = True
        if (kind != "lora" or "P" in extra) and self._quantised:
            what = "training the backbone itself" if "P" in extra else f"adapter = {kind}"
            raise FedtriError(f"model_options.quantization: {what} needs plain weights; set it to none")
        model.requires_grad_(False)
        backbone = self._open(model, targets, head) if "P" in extra else ()
        if rank % heads:
            raise FedtriError(f"rank: expected a multiple of method_options.heads ({heads}), got {rank}")
        for name in targets:
            d_out, d_in = shape_of(model.get_submodule(name))
            if rank > min(d_out, d_in):
                raise FedtriError(
                    f"rank: {rank} is larger than layer {name} ({d_out} x {d_in}); use at most {min(d_out, d_in)}"
                )
            layers.append(Layer(name, d_in, d_out))
            base = model.get_submodule(name)
            model.set_submodule(name, TriLinear(base, clients, rank, self.routing, kind=kind, heads=heads))
        for name in head:
            base = model.get_submodule(name)
            assert isinstance(base, nn.Linear)
            head_shapes.append((f"{name}.weight", tuple(base.weight.shape)))
            if base.bias is not None:
                head_shapes.append((f"{name}.bias", tuple(base.bias.shape)))
            model.set_submodule(name, StackedLinear(base, clients, self.routing))
        beside = "".join(f for f in "SMW" if f in extra or (f == "M" and kind == "dora"))
        self.layout = Layout(tuple(layers), tuple(head_shapes), backbone, beside, heads)
        self.packing = packing.prepare(model, self.routing)
        self.trim = trim.prepare(model, self.routing)
        self.prefix = prefix.prepare(model, targets, self.routing)
        self._recomputation = Recomputation(model, self.routing) if checkpointing else None

    def _open(
        self, model: nn.Module, targets: Sequence[str], head: Sequence[str]
    ) -> tuple[tuple[str, tuple[int, ...]], ...]:
        """The backbone's own parameters, which learn where there are no adapters: of one client at a time."""
        if targets or self.clients > 1:
            raise FedtriError("method: training the backbone itself takes no targets and a cohort of one")
        return tuple(
            (name, tuple(value.shape)) for name, value in model.named_parameters()
            if not any(name.startswith(f"{layer}.") for layer in head)
        )  # fmt: skip

    def stacked(self, key: Key) -> nn.Parameter:
        """The parameter (m, ...) that holds this tensor of every client; of "P", the model's only one."""
        return self.model.get_parameter(key.layer if key.factor in "PH" else f"{key.layer}.{key.factor}")

    def _of(self, key: Key, stack: Tensor, slot: int) -> Tensor:
        return stack if key.factor == "P" else stack[slot]

    def layer(self, name: str) -> TriLinear:
        """The adapted layer of this name."""
        module = self.model.get_submodule(name)
        assert isinstance(module, TriLinear)
        return module

    def write(
        self, slot: int, factors: Factors, rank: int, alpha: float, classes: Int[np.ndarray, "own"] | None = None
    ) -> None:
        """Put a client's tensors into a slot, zero-padded to the cohort's rank.

        `classes` are the rows of the head's last layer that this client has; its tensors of that layer hold these
        rows alone, and it never answers with another. None: all.
        """
        own = None if classes is None else torch.as_tensor(classes, dtype=torch.long, device=self.device)
        self._slots[slot] = Slot(rank, alpha / rank, own)
        if self._last is not None:
            last = self.model.get_submodule(self._last)
            assert isinstance(last, StackedLinear)
            last.open(slot, own)
        with torch.no_grad():
            for layer in self.layout.layers:
                self.layer(layer.name).scale[slot] = alpha / rank
                self.layer(layer.name).dense.pop(slot, None)
            for key, value in factors.items():
                if key.factor == "W":
                    self._write_dense(slot, key, value)
                    continue
                target = self._of(key, self.stacked(key).detach(), slot)
                target.copy_(self.expanded(slot, key, value.to(target)))

    def expanded(self, slot: int, key: Key, value: Tensor) -> Tensor:
        """A client's tensor in the shape that its slot has room for, zero where it has nothing of its own."""
        if key.factor == "P":
            return value
        room = value.new_zeros(self.stacked(key).shape[1:])
        if (rows := self._rows(slot, key)) is None:
            room[tuple(slice(n) for n in value.shape)] = value
        else:
            room[rows] = value
        return room

    def _rows(self, slot: int, key: Key) -> Tensor | None:
        """The rows of the whole that a client's tensor consists of, where it is not the first ones."""
        return self._slots[slot].classes if self._by_class(key) else None

    def _by_class(self, key: Key) -> bool:
        """Whether a tensor has a row for each class."""
        return key.factor == "H" and key.layer.rpartition(".")[0] == self._last

    def of_classes(self, factors: Factors, classes: Int[np.ndarray, "own"] | None) -> Factors:
        """Tensors for all classes, cut to the rows of these; None: as they are."""
        if classes is None:
            return factors
        rows = torch.as_tensor(classes, dtype=torch.long)
        return {key: value[rows] if self._by_class(key) else value for key, value in factors.items()}

    def initial(self) -> dict[Key, Tensor]:
        """What every client starts from where the model itself says it: DoRA's M = ‖W0‖ by row, and P."""
        found = {key: self.stacked(key).detach().cpu().clone() for key in self.layout.keys(frozenset("P"))}
        for key in self.layout.keys(frozenset("M")):
            found[key] = self.layer(key.layer).squares.sqrt().cpu().clone()
        return found

    def _write_dense(self, slot: int, key: Key, value: Tensor) -> None:
        """Keep a client's W, as one copy with those of the cohort that are equal to it."""
        layer = self.layer(key.layer)
        value = value.to(layer.B)
        layer.dense[slot] = next((W for W in layer.dense.values() if torch.equal(W, value)), value)

    def read(self, slot: int, kinds: frozenset[str]) -> dict[Key, Tensor]:
        """A copy of a client's tensors, at its own rank, on the CPU; no W where it has none."""
        shapes = self.layout.shapes(self._slots[slot].rank)
        own = {}
        for key in self.layout.keys(kinds - {"W"}):
            whole, rows = self._of(key, self.stacked(key).detach(), slot), self._rows(slot, key)
            own[key] = whole[tuple(slice(n) for n in shapes[key])] if rows is None else whole[rows]
        dense = {key: self.layer(key.layer).dense.get(slot) for key in self.layout.keys(kinds & {"W"})}
        own |= {key: W for key, W in dense.items() if W is not None}
        return {key: value.cpu().clone() for key, value in own.items()}

    def train_only(self, kinds: frozenset[str]) -> None:
        """Let these factors learn, with gradient buffers of their own, and freeze the others."""
        if self._recomputation is not None:
            self._recomputation.learning(bool(kinds))
        for key in self.layout.keys(self.layout.factors - {"W"}):
            parameter = self.stacked(key)
            learns = key.factor in kinds
            parameter.requires_grad_(learns)
            parameter.grad = torch.zeros_like(parameter) if learns else None
            if key.factor != "P":
                module, name = self._place(key)
                own = [_view(parameter, slot) for slot in range(self.clients)] if learns else None
                module.own.pop(name, None) if own is None else module.own.update({name: own})

    def slices(self, slot: int, kinds: frozenset[str]) -> dict[Key, nn.Parameter]:
        """One client's share of the stacked parameters that learn, as views that an ordinary optimiser can step."""
        views = {}
        for key in self.layout.keys(kinds):
            if key.factor == "P":
                views[key] = self.stacked(key)
                continue
            module, name = self._place(key)
            views[key] = module.own[name][slot] if name in module.own else _view(self.stacked(key), slot)
        return views

    def _place(self, key: Key) -> tuple[Stacked, str]:
        """The layer that keeps this tensor, and under which name."""
        layer, name = key.layer.rsplit(".", 1) if key.factor == "H" else (key.layer, key.factor)
        module = self.model.get_submodule(layer)
        assert isinstance(module, Stacked)
        return module, name

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    @property
    def together(self) -> bool:
        """Whether clients are to share passes: a GPU wants large ones, a processor's threads one client each.

        bitsandbytes keeps what a pass needs in its layers, so that two threads must not use one.
        """
        return self.device.type != "cpu" or bool(self._quantised)

    def route(
        self,
        slots: Sequence[int] | Int[np.ndarray, "batch"] | Int[Tensor, "batch"],
        *,
        pack: bool = False,
        examples: Int[np.ndarray, "batch"] | None = None,
    ) -> None:
        """Say which slot each sample of the next batch belongs to, whether the batch may be packed, and, where the pass
        may begin with states that `prefix` keeps, which examples it holds.
        """
        kept = examples if examples is not None and self.prefix is not None and self.prefix.ready(examples) else None
        self.routing.set(torch.as_tensor(slots, dtype=torch.long, device=self.device))
        self.routing.packing, self.routing.examples = pack, kept


def _view(stack: nn.Parameter, slot: int) -> nn.Parameter:
    view = nn.Parameter(stack.data[slot], requires_grad=stack.requires_grad)
    view.grad = None if stack.grad is None else stack.grad[slot]
    return view


def initial_factors(
    layout: Layout, head: Factors, *, rank: int, seed: int, basis: str = "kaiming"
) -> dict[Key, Tensor]:
    """What every client starts from, derived from the run's seed and never sent.

    "kaiming": A Kaiming-uniform as in PEFT, C = I, B = 0. "orthonormal": rows of A and columns of B orthonormal,
    C = 0. Either way ΔW = 0. The rows of a smaller rank are the first rows of a larger one. S = 1.
    """
    factors: dict[Key, Tensor] = {}
    for layer in layout.layers:
        if basis == "orthonormal":
            A = _orthonormal(layer.d_in, rank, generator(seed, "A", layer.name)).mT.contiguous()
            B = _orthonormal(layer.d_out, rank, generator(seed, "B", layer.name))
            C = torch.zeros(rank, rank // layout.heads)
        else:
            A, B, C = torch.empty(rank, layer.d_in), torch.zeros(layer.d_out, rank), torch.eye(rank)
            nn.init.kaiming_uniform_(A, a=math.sqrt(5), generator=generator(seed, "A", layer.name))
        factors |= {Key(layer.name, "A"): A, Key(layer.name, "C"): C, Key(layer.name, "B"): B}
        if "S" in layout.extra:
            factors[Key(layer.name, "S")] = torch.ones(layout.heads)
    return factors | dict(head)


def _orthonormal(d: int, rank: int, rng: torch.Generator) -> Float[Tensor, "d rank"]:
    columns = [torch.randn(d, generator=rng, dtype=torch.float64) for _ in range(rank)]
    return torch.linalg.qr(torch.stack(columns, 1)).Q.float()


def folded(factors: Factors) -> dict[Key, Tensor]:
    """The same tensors with every S multiplied into its C: s_iH_i is what RAVAN sends."""
    result = dict(factors)
    for key in [key for key in factors if key.factor == "S"]:
        core = Key(key.layer, "C")
        blocks = factors[core].unflatten(0, (len(factors[key]), -1)) * factors[key][:, None, None]
        result |= {core: blocks.flatten(0, 1), key: torch.ones_like(factors[key])}
    return result


def core_of(factors: Factors, layer: str) -> Float[Tensor, "r r"]:
    """C of one client's layer as the square matrix it stands for, S multiplied in."""
    own = folded({key: value for key, value in factors.items() if key.layer == layer and key.factor in "CS"})
    return block_diagonal(own[Key(layer, "C")])


def effective_update(factors: Mapping[Key, Tensor], layer: str, scale: float) -> Float[Tensor, "d_out d_in"]:
    """s · B C A of one client's layer, dense and without its W: for tests and for merging, never for the server."""
    return scale * (factors[Key(layer, "B")] @ core_of(factors, layer) @ factors[Key(layer, "A")])
