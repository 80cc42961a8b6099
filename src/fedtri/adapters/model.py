"""A model with adapters: which layers have one, one client's tensors loaded into it, and read out again.

    adapted = install(model, targets=..., head=..., rank=8)
    load(adapted, factors, rank=8, alpha=16.0)
    adapted.model(**inputs).logits        # this client's

The model is changed in place: targets become AdaptedLinear, the linear layers of the head HeadLinear, all else is
frozen. It is a plain module and carries one client at a time.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor, nn

from fedtri.adapters.bfloat16 import narrow_products
from fedtri.adapters.layer import AdaptedLinear, HeadFactors, HeadLinear, Kind, LayerFactors, plain, precision, shape_of
from fedtri.adapters.layout import Factors, Key, Layer, Layout
from fedtri.errors import FedtriError

Classes = Int[np.ndarray, "own"] | None
"""The classes that a client has a head for, ascending; None: all."""


@dataclass(frozen=True)
class AdaptedModel:
    """A model with room for one client's tensors."""

    model: nn.Module
    layout: Layout
    kind: Kind
    initial: Factors
    """What every client starts from where the model itself says it: DoRA's M = ‖W0‖ by row, and P."""
    quantised: bool = False
    mixed_precision: bool = False

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The number type of what learns: float32 where the model is kept in fewer bits."""
        return precision(next(value for value in self.model.parameters() if value.is_floating_point()))

    def layer(self, name: str) -> AdaptedLinear:
        """The adapted layer of this name."""
        module = self.model.get_submodule(name)
        assert isinstance(module, AdaptedLinear)
        return module


@dataclass(frozen=True)
class Adapter:
    """One client's tensors by layer, ready for a forward pass."""

    layers: Mapping[str, LayerFactors]
    head: Mapping[str, HeadFactors]


def install(
    model: nn.Module,
    *,
    targets: Sequence[str],
    head: Sequence[str],
    rank: int,
    kind: Kind = "lora",
    extra: str = "",
    heads: int = 1,
    mixed_precision: bool = False,
) -> AdaptedModel:
    """Put adapters into a model, and freeze the rest. Dropout is off for good.

    Args:
        targets: Names of the linear layers that get an adapter.
        head: Names of the linear layers of the task head, the one that knows the classes last.
        rank: The largest rank of any client.
        kind: What the adapter computes; see `layer.py`.
        extra: Factors beside A, C, B and H, of S, W, a and b; "P": the model's own parameters learn.
        heads: Blocks on the diagonal of C.
        mixed_precision: Products with frozen linear layers in bfloat16.

    Raises:
        FedtriError: For a rank that is larger than a layer or no multiple of `heads`, and for quantised weights where
            plain ones are needed.
    """
    model.eval()
    quantised = [layer for layer in model.modules() if isinstance(layer, nn.Linear) and not plain(layer)]
    for layer in quantised:  # in evaluation mode bitsandbytes repacks weights so that no gradient passes
        layer.training = True
    if mixed_precision and (quantised or "P" in extra):
        what = "quantised weights are" if quantised else "a backbone that learns is"
        raise FedtriError(f"model_options.mixed_precision: {what} not for bfloat16 products; set it to none")
    if (kind != "lora" or "P" in extra) and quantised:
        what = "training the backbone itself" if "P" in extra else f"adapter = {kind}"
        raise FedtriError(f"model_options.quantization: {what} needs plain weights; set it to none")
    if rank % heads:
        raise FedtriError(f"rank: expected a multiple of method_options.heads ({heads}), got {rank}")
    model.requires_grad_(False)
    backbone = _parameters_beside(model, targets, head) if "P" in extra else ()
    layers = [_layer(model, name, rank) for name in targets]
    shapes = [shape for name in head for shape in _head_shapes(model, name)]
    for name in head:
        base = model.get_submodule(name)
        assert isinstance(base, nn.Linear)
        model.set_submodule(name, HeadLinear(base, name))
    adapters = {name: AdaptedLinear(model.get_submodule(name), name, kind) for name in targets}
    if mixed_precision:  # DoRA's norms are of the weights as they were
        narrow_products(model, targets)
    for name, adapter in adapters.items():
        adapter.base = model.get_submodule(name)
        model.set_submodule(name, adapter)
    beside = "".join(f for f in "SMWab" if f in extra or (f == "M" and kind == "dora"))
    initial = {Key(name, "P"): model.get_parameter(name).detach().cpu().clone() for name, _ in backbone}
    if kind == "dora":
        initial |= {Key(name, "M"): one.squares.sqrt().cpu().clone() for name, one in adapters.items()}
    return AdaptedModel(
        model=model,
        layout=Layout(tuple(layers), tuple(shapes), backbone, beside, heads),
        kind=kind,
        initial=initial,
        quantised=bool(quantised),
        mixed_precision=mixed_precision,
    )


def _parameters_beside(
    model: nn.Module, targets: Sequence[str], head: Sequence[str]
) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """The model's own parameters but the head's, which learn where there are no adapters."""
    if targets:
        raise FedtriError("method: training the backbone itself takes no targets")
    return tuple(
        (name, tuple(value.shape)) for name, value in model.named_parameters()
        if not any(name.startswith(f"{layer}.") for layer in head)
    )  # fmt: skip


def _layer(model: nn.Module, name: str, rank: int) -> Layer:
    d_out, d_in = shape_of(model.get_submodule(name))
    if rank > min(d_out, d_in):
        raise FedtriError(
            f"rank: {rank} is larger than layer {name} ({d_out} x {d_in}); use at most {min(d_out, d_in)}"
        )
    return Layer(name, d_in, d_out)


def _head_shapes(model: nn.Module, name: str) -> list[tuple[str, tuple[int, ...]]]:
    return [(f"{name}.{own}", tuple(value.shape)) for own, value in model.get_submodule(name).named_parameters()]


def load(adapted: AdaptedModel, factors: Factors, *, rank: int, alpha: float, classes: Classes = None) -> None:
    """Put copies of one client's tensors into the model, in place of whoever's it carried."""
    for layer in adapted.layout.layers:
        adapted.layer(layer.name).factors.clear()
    for key, value in factors.items():
        if key.factor == "P":
            parameter = adapted.model.get_parameter(key.layer)
            parameter.data = value.to(parameter, copy=True)
        elif key.factor == "H":
            module, name = _head_place(adapted.model, key)
            setattr(module, name, _parameter(value.to(adapted.device, adapted.dtype, copy=True)))
            module.classes = _own_rows(adapted, key, classes)
        else:
            layer = adapted.layer(key.layer)
            layer.scale = alpha / rank
            layer.factors[key.factor] = _parameter(value.to(adapted.device, adapted.dtype, copy=True))


def unload(adapted: AdaptedModel) -> None:
    """Take the client's adapter out of the model; what learns in the model itself becomes what it was at first."""
    for layer in adapted.layout.layers:
        adapted.layer(layer.name).factors.clear()
    for key in adapted.layout.keys(frozenset("P")):
        adapted.model.get_parameter(key.layer).data.copy_(adapted.initial[key])


def parameters(adapted: AdaptedModel, kinds: frozenset[str]) -> dict[Key, nn.Parameter]:
    """The loaded client's parameters of these factors, in the layout's order; a dense W never learns."""
    found = {}
    for key in adapted.layout.keys(kinds - {"W"}):
        if key.factor == "P":
            found[key] = adapted.model.get_parameter(key.layer)
        elif key.factor == "H":
            found[key] = getattr(*_head_place(adapted.model, key))
        else:
            found[key] = adapted.layer(key.layer).factors[key.factor]
    return found


def read(adapted: AdaptedModel, kinds: frozenset[str]) -> dict[Key, Tensor]:
    """A copy of the loaded client's tensors of these factors, on the CPU."""
    return {key: value.detach().cpu().clone() for key, value in parameters(adapted, kinds).items()}


def adapter(adapted: AdaptedModel, factors: Factors, *, rank: int, alpha: float, classes: Classes = None) -> Adapter:
    """One client's tensors by layer, for forward passes in which several clients share the model's frozen weights.

    Tensors that are where the model is and of the number type that learns there are taken as they are, not copied: a
    parameter among them gets its gradient.
    """
    device, dtype = adapted.device, adapted.dtype
    layers: dict[str, dict[str, Tensor]] = {}
    head: dict[str, dict[str, Tensor]] = {}
    for key, value in factors.items():
        if key.factor == "H":
            module, name = _head_place(adapted.model, key)
            own = head.setdefault(module.name, {})
            own[name] = value.to(device, dtype)
            if (rows := _own_rows(adapted, key, classes)) is not None:
                own["classes"] = rows
        elif key.factor != "P":
            own = layers.setdefault(key.layer, {})
            own[key.factor] = value.to(device, dtype)
    return Adapter(
        {name: LayerFactors(**own, scale=alpha / rank) for name, own in layers.items()},
        {name: HeadFactors(**own) for name, own in head.items()},
    )


def of_classes(layout: Layout, factors: Factors, classes: Classes) -> Factors:
    """Tensors for all classes, cut to the rows of these; None: as they are."""
    if classes is None:
        return factors
    rows = torch.as_tensor(classes, dtype=torch.long)
    return {key: value[rows] if by_class(layout, key) else value for key, value in factors.items()}


def open_head(layout: Layout, factors: Factors) -> Factors:
    """The tensors with the identity as the head's last layer: the model's logits are then what enters that layer."""
    width = next(shape[-1] for name, shape in layout.head if by_class(layout, Key(name, "H")) and len(shape) == 2)
    opened = dict(factors)
    for key, value in factors.items():
        if by_class(layout, key):
            opened[key] = torch.eye(width).to(value) if value.dim() == 2 else torch.zeros(width).to(value)
    return opened


def by_class(layout: Layout, key: Key) -> bool:
    """Whether a tensor has a row for each class: those of the head's last layer."""
    return key.factor == "H" and key.layer.rpartition(".")[0] == layout.head[-1][0].rpartition(".")[0]


def _own_rows(adapted: AdaptedModel, key: Key, classes: Classes) -> Tensor | None:
    if classes is None or not by_class(adapted.layout, key):
        return None
    return torch.as_tensor(classes, dtype=torch.long, device=adapted.device)


def _head_place(model: nn.Module, key: Key) -> tuple[HeadLinear, str]:
    layer, _, name = key.layer.rpartition(".")
    module = model.get_submodule(layer)
    assert isinstance(module, HeadLinear)
    return module, name


def _parameter(value: Tensor) -> nn.Parameter:
    return nn.Parameter(value, requires_grad=False)
