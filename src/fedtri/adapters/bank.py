"""A model that carries the factors of several clients at once, over one copy of its base weights.

Each sample of a batch meets its own client's factors; one client is a cohort of one. Clients of smaller rank are
zero-padded: where a row of A and the matching column of B are zero, both gradients are zero, so padding stays zero.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor, nn

from fedtri.adapters.layer import Kind, Stacked, StackedLinear, TriLinear, plain, shape_of
from fedtri.adapters.layout import Factors, Key, Layer, Layout
from fedtri.errors import FedtriError
from fedtri.execution import mixed, packing, prefix, trim
from fedtri.execution.recompute import Recomputation
from fedtri.execution.routing import Routing
from fedtri.execution.workers import shared


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
        mixed_precision: bool = False,
    ) -> None:
        self.model, self.clients, self.rank = model.eval(), clients, rank
        self.kind, self.routing = kind, Routing()
        self._last = head[-1] if head else None
        self._slots: dict[int, Slot] = {}
        self._shared: dict[Key, int] = {}
        self._places: dict[Key, tuple[Stacked, str]] = {}
        layers, head_shapes = [], []
        self._quantised = [layer for layer in model.modules() if isinstance(layer, nn.Linear) and not plain(layer)]
        for layer in self._quantised:  # in evaluation mode bitsandbytes repacks weights so that no gradient passes
            layer.training = True
        if mixed_precision and (self._quantised or "P" in extra):
            what = "quantised weights are" if self._quantised else "a backbone that learns is"
            raise FedtriError(f"model_options.mixed_precision: {what} not for bfloat16 products; set it to none")
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
        self.packing = packing.prepare(model, self.routing, in_rows=self.together)
        self.trim = trim.prepare(model, self.routing)
        self.prefix = prefix.prepare(model, targets, self.routing)
        if mixed_precision:  # last, since what packing and its like try goes by float32's rounding
            mixed.prepare(model, [self.layer(layer.name).base for layer in layers])
            if self.packing is not None and not self.together:
                self.packing.multiple = mixed.ROWS
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
        if key.factor == "P":
            return self.model.get_parameter(key.layer)
        module, name = self._place(key)
        return getattr(module, name)

    def _of(self, key: Key, stack: Tensor, slot: int) -> Tensor:
        return stack if key.factor == "P" else stack[slot]

    def share(self) -> None:
        """Put what clients leave behind where workers share it: call it before they set out side by side."""
        for key in self.layout.keys(self.layout.factors - {"P", "W"}) if self.clients > 1 else ():
            stack = self.stacked(key)
            if self._shared.get(key) != stack.data_ptr():
                stack.data = shared(stack.data)
                self._shared[key] = stack.data_ptr()
        if self.prefix is not None:
            self.prefix.open()

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
        if key not in self._places:  # finding a module by its name takes longer than writing a tensor
            layer, name = key.layer.rsplit(".", 1) if key.factor == "H" else (key.layer, key.factor)
            module = self.model.get_submodule(layer)
            assert isinstance(module, Stacked)
            self._places[key] = module, name
        return self._places[key]

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    @property
    def together(self) -> bool:
        """Whether all clients are to share passes, as a GPU wants it: a processor's cores train clients apart.

        bitsandbytes keeps what a pass needs in its layers, so that two threads must not use one.
        """
        return self.device.type != "cpu" or bool(self._quantised)

    @property
    def sharing(self) -> bool:
        """Whether several clients' texts can go through the model in one pass at no client's cost."""
        if self.packing is None:  # such models may take inputs that belong to no example, and so to no client
            return False
        return not self.packing.end_to_end or all(self.layer(one.name).by_client for one in self.layout.layers)

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
