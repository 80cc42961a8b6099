"""A head that reads each text's first token only: the others leave the last layer as soon as attention has read them.

Behind its attention a layer treats every token apart, so what it would make of tokens that nobody reads is for nothing:
5 of 6 products of a BERT-like model's last layer. Which module to cut at is found by trying, in the order in which the
last layer calls its modules: the first at which a trial gives the same logits. Some linear layers before the cut, as
attention's query, serve first tokens alone, too: those with which a trial gives the same logits where all other tokens
get zeros. Features, which read all tokens, call the backbone itself and are left alone.
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from fedtri.execution.packing import agree, layer_list, short_texts, takes_texts
from fedtri.execution.routing import Routing


class Trim:
    """The hooks on one model: one says that the whole model runs, one cuts."""

    def __init__(self, model: nn.Module, last: nn.Module, routing: Routing) -> None:
        self.last, self.routing = last, routing
        self._cut: Any = None
        self._hooks = [
            model.register_forward_pre_hook(self._begin),
            model.register_forward_hook(self._end, always_call=True),
        ]

    def at(self, module: nn.Module | None) -> None:
        """Cut before this module, and nowhere else."""
        if self._cut is not None:
            self._cut.remove()
        self._cut = None if module is None else module.register_forward_pre_hook(self._first_tokens, with_kwargs=True)

    def narrow(self, layer: nn.Module) -> Callable[[], None]:
        """Compute this linear layer for first tokens only; returns what undoes it."""
        hooks = [layer.register_forward_pre_hook(self._gather), layer.register_forward_hook(self._spread)]
        self._hooks += hooks

        def undo() -> None:
            for hook in hooks:
                hook.remove()

        return undo

    def remove(self) -> None:
        """Take the hooks off the model."""
        self.at(None)
        for hook in self._hooks:
            hook.remove()

    def _begin(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        # a layer that is computed again in the backward pass would not be told to cut
        self.routing.first_only = self.routing.packing and not getattr(self.last, "gradient_checkpointing", False)

    def _end(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.routing.first_only, self.routing.whole = False, None

    def _first_tokens(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self.routing.first_only:
            return None
        self._route_texts()
        return tuple(map(self._first, args)), {name: self._first(value) for name, value in kwargs.items()}

    def _gather(self, module: nn.Module, args: tuple[Any, ...]) -> Any:
        if not self.routing.first_only:
            return None
        self.routing.whole = args[0], self.routing.slots
        self._route_texts()
        return (self._first(args[0]),)

    def _spread(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """The output laid back where its tokens were, zeros elsewhere."""
        if self.routing.whole is None:
            return None
        (whole, slots), self.routing.whole = self.routing.whole, None
        self.routing.set(slots)
        rows, width = whole.shape[:2]
        wide = output.new_zeros(rows * width, output.shape[-1])
        return wide.index_copy(0, self._firsts(whole), output[:, 0]).unflatten(0, (rows, width))

    def _route_texts(self) -> None:
        if self.routing.pending is not None:
            self.routing.set(self.routing.pending.slots)

    def _first(self, value: Any) -> Any:
        """(texts, 1, d) of an activation (rows, width, d), anything else as it is."""
        if not isinstance(value, Tensor) or value.dim() != 3:
            return value
        return value.flatten(0, 1).index_select(0, self._firsts(value))[:, None]

    def _firsts(self, value: Tensor) -> Int[Tensor, "texts"]:
        """Where, in all rows end to end, each text begins."""
        if self.routing.pending is not None:
            return self.routing.pending.firsts
        return torch.arange(len(value), device=value.device) * value.shape[1]


def prepare(model: nn.Module, routing: Routing) -> Trim | None:
    """Trimming for this model, or None where its head reads more than first tokens or no module will do."""
    layers = layer_list(model)
    if layers is None or not takes_texts(model) or next(model.parameters()).is_meta:
        return None
    last = layers[1][-1]
    plain = _logits(model, routing, ours=False)
    if plain is None or not _reads_first(model, last, routing, plain):
        return None
    called = _called(model, last, routing)
    trim = Trim(model, last, routing)
    before, inside = list[nn.Module](), set[nn.Module]()
    for module in called:
        trim.at(module)
        if _same(_logits(model, routing, ours=True), plain):
            break
        before.append(module)
    else:
        trim.remove()
        return None
    for module in before:
        if module not in inside and any(own.dim() > 1 for own in module.parameters(recurse=False)):
            undo = trim.narrow(module)
            if _same(_logits(model, routing, ours=True), plain):
                inside |= set(module.modules())
            else:
                undo()
    return trim


@torch.inference_mode()
def _logits(model: nn.Module, routing: Routing, *, ours: bool) -> Tensor | None:
    """What the head says to six short texts, padded ones first; None where the model will not have it."""
    device = next(model.parameters()).device
    ids, mask = short_texts(device)
    routing.set(torch.zeros(3, dtype=torch.long, device=device))
    try:
        routing.packing = ours
        found = [model(input_ids=ids, attention_mask=mask), model(input_ids=ids.flip(0)[:, :2])]
    except (TypeError, ValueError, RuntimeError, IndexError):  # whatever a model says to what it does not expect
        return None
    finally:
        routing.packing, routing.pending = False, None
    return torch.cat([answer[0] for answer in found]) if all(answer[0].dim() == 2 for answer in found) else None


def _reads_first(model: nn.Module, last: nn.Module, routing: Routing, plain: Tensor) -> bool:
    """Whether the logits stay what they are when all but the first tokens leave the last layer as zeros."""

    def blank(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        hidden = output if isinstance(output, Tensor) else output[0]
        hidden = torch.cat([hidden[:, :1], torch.zeros_like(hidden[:, 1:])], 1)
        return hidden if isinstance(output, Tensor) else (hidden, *output[1:])

    hook = last.register_forward_hook(blank)
    try:
        return _same(_logits(model, routing, ours=False), plain)
    finally:
        hook.remove()


def _called(model: nn.Module, layer: nn.Module, routing: Routing) -> list[nn.Module]:
    """The modules within a layer, in the order in which they are called."""
    seen: list[nn.Module] = []
    inner = [module for module in layer.modules() if module is not layer]
    hooks = [module.register_forward_pre_hook(lambda module, args: seen.append(module)) for module in inner]
    try:
        _logits(model, routing, ours=False)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def _same(found: Tensor | None, plain: Tensor) -> bool:
    return found is not None and agree(found, plain)
