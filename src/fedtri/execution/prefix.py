"""Layers below the first adapter never learn: what leaves them is computed once for each example, and kept.

The hidden states that enter the first adapted layer are laid end to end, one example after the other. A pass over
examples that are kept skips the layers below and starts from there, in packed rows (packing.py) or padded; tasks and
methods do not know. Examples are computed in groups that depend on the run's settings alone, so that a resumed run
finds the same numbers. `prepare` tries a model on short texts, and one whose results differ goes on without.
"""

import inspect
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from fedtri.errors import FedtriError
from fedtri.execution.packing import agree, backbone_of, layer_list, short_texts, takes_texts
from fedtri.execution.routing import Routing
from fedtri.execution.workers import empty_shared

Rows = Int[np.ndarray, "_"]


@runtime_checkable
class Texts(Protocol):
    """What is needed of a task's examples."""

    @property
    def lengths(self) -> Int[np.ndarray, "n"]:
        """Real tokens of each example."""
        ...

    def batch(self, rows: Rows) -> Mapping[str, Tensor]:
        """input_ids and what else the model takes of these examples."""
        ...


@dataclass(frozen=True)
class _Pass:
    """What a pass has to do with the kept states: begin with these, or stop at them and hand them over."""

    states: Tensor | None
    hand_over: Callable[[Tensor], None] | None = None


class _EnoughError(Exception):
    """The layers below have been computed, and no more is wanted."""


class Prefix:
    """The hooks on one model, and the kept states of a federation's examples."""

    def __init__(self, model: nn.Module, first: int, routing: Routing) -> None:
        found, backbone = layer_list(model), backbone_of(model)
        assert found is not None
        assert backbone is not None
        self.model, self.backbone, self.routing = model, backbone, routing
        self._below, self._first = list(found[1])[:first], found[1][first]
        self._names = list(inspect.signature(backbone.forward).parameters)
        self._empty()
        for layer in self._below:
            layer.forward = self._skipping(layer.forward)
        self._hooks = [
            self.backbone.register_forward_pre_hook(self._begin, with_kwargs=True),
            self.backbone.register_forward_hook(self._end, always_call=True),
            self._first.register_forward_pre_hook(self._enter, with_kwargs=True),
        ]

    def _empty(self) -> None:
        self._texts: Texts | None = None
        self._states: Tensor | None = None
        self._groups: list[Rows] = []

    def remove(self) -> None:
        """Take the hooks off the model."""
        for hook in self._hooks:
            hook.remove()
        for layer in self._below:
            del layer.forward

    def keep(
        self,
        texts: Texts,
        groups: Iterable[Rows],
        *,
        budget: int,
        folder: Path | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """From now on keep the states of the examples in these groups, each computed when one of its group is needed.

        Args:
            groups: Row numbers; no row stands in two of them.
            budget: Bytes; states that take more lie in a file under `folder`, mapped into memory, gone with the run.
            dtype: Of the kept states; None: the model's own, which changes no result.
        """
        self._empty()
        self._texts, self._groups = texts, list(groups)
        self._budget, self._folder, self._dtype = budget, folder, dtype
        self._group = np.full(len(texts.lengths), -1)  # of each example; -1: not kept
        self._start = np.zeros(len(texts.lengths), np.int64)
        for number, rows in enumerate(self._groups):
            self._group[rows] = number
        kept = np.flatnonzero(self._group >= 0)
        ends = np.cumsum(texts.lengths[kept])
        self._start[kept], self._total = ends - texts.lengths[kept], int(ends[-1]) if len(kept) else 0
        self._done = empty_shared((len(self._groups),), torch.bool).fill_(False).numpy()

    def open(self) -> None:
        """Make room for the states, before processes fork that are to share it; the first group tells how much."""
        if self._states is None and self._groups:
            self.ready(self._groups[0])

    def ready(self, rows: Rows) -> bool:
        """Whether these examples are kept; those that are to be and are not yet, are computed now."""
        if self._texts is None or (self._group[rows] < 0).any():
            return False
        if getattr(self._first, "gradient_checkpointing", False):  # it would be computed again without them
            return False
        for number in np.unique(self._group[rows]):
            if not self._done[number]:
                self._compute(self._groups[number])
                self._done[number] = True
        return True

    def _compute(self, rows: Rows) -> None:
        """Run the layers below on these examples, and keep what leaves them."""
        assert self._texts is not None
        device = next(self.backbone.parameters()).device
        batch = {name: value.to(device) for name, value in self._texts.batch(rows).items()}
        inputs = {name: value for name, value in batch.items() if name in self._names}
        self.routing.set(torch.zeros(len(rows), dtype=torch.long, device=device))
        self.routing.packing, self.routing.examples = True, rows
        self.routing.computing = True
        try:
            with torch.inference_mode(False), torch.no_grad(), suppress(_EnoughError):
                self.backbone(**inputs)
        finally:
            self.routing.computing, self.routing.examples = False, None
            self.routing.packing, self.routing.pending = False, None

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Where this pass's tokens lie among the kept states; packing has been here before."""
        given = {**dict(zip(self._names, args, strict=False)), **kwargs}
        self.routing.prefix, rows = None, self.routing.examples
        ids, mask, pending = given.get("input_ids"), given.get("attention_mask"), self.routing.pending
        if rows is None or self._texts is None or ids is None:
            return
        real = pending.real if pending is not None else torch.ones_like(ids).bool() if mask is None else mask.bool()
        lengths = self._texts.lengths[rows]
        if real.dim() != 2 or not np.array_equal(real.sum(1).cpu().numpy(), lengths):
            return
        within = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        kept = torch.from_numpy(np.repeat(self._start[rows], lengths) + within)  # of each real token
        shape = ids.shape
        places = pending.places if pending is not None else torch.nonzero(real.flatten())[:, 0]
        if self.routing.computing:
            self.routing.prefix = _Pass(None, lambda states: self._store(kept, states.flatten(0, 1)[places]))
            return
        assert self._states is not None
        states = self._states.index_select(0, kept).to(places.device)
        spread = states.new_zeros(shape.numel(), states.shape[1]).index_copy(0, places, states)
        self.routing.prefix = _Pass(spread.unflatten(0, shape))

    def _end(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.routing.prefix = None

    def _skipping(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """The layer's forward, which hands its input on in passes that begin above it."""

        def skipping(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
            running = self.routing.prefix
            return hidden if running is not None and running.states is not None else forward(hidden, *args, **kwargs)

        return skipping

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What enters the first adapted layer."""
        running = self.routing.prefix
        if running is None:
            return None
        if running.hand_over is not None:
            running.hand_over(args[0] if args else kwargs["hidden_states"])
            raise _EnoughError
        assert running.states is not None
        if args:
            return (running.states.to(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": running.states.to(kwargs["hidden_states"])}

    def _store(self, kept: Int[Tensor, "tokens"], states: Float[Tensor, "tokens d"]) -> None:
        if self._states is None:
            self._states = self._room(states.shape[1], self._dtype or states.dtype)
        self._states[kept] = states.to(self._states)

    def _room(self, width: int, dtype: torch.dtype) -> Float[Tensor, "total d"]:
        """Memory for all states; where that is over the budget, a file's that has no name any more."""
        size = self._total * width * dtype.itemsize
        if size <= self._budget:
            return empty_shared((self._total, width), dtype)
        if self._folder is not None:
            self._folder.mkdir(parents=True, exist_ok=True)
        handle, path = tempfile.mkstemp(prefix="prefix-", dir=self._folder)
        try:
            free = shutil.disk_usage(path).free  # a mapped file that finds no room later would end the process
            if size > free:
                raise FedtriError(
                    f"simulation.prefix_budget: hidden states of {size >> 20} MB are more than it allows in memory and "
                    f"{Path(path).parent} has {free >> 20} MB; free some there, or set it to 0 to keep none"
                )
            os.truncate(handle, size)
            flat = torch.from_file(path, shared=True, size=self._total * width, dtype=dtype)
        finally:
            os.close(handle)
            os.unlink(path)
        return flat.unflatten(0, (self._total, width))


def prepare(model: nn.Module, targets: Sequence[str], routing: Routing) -> Prefix | None:
    """A prefix for this model and its adapted layers, or None where none is frozen or a trial on short texts fails."""
    found = layer_list(model)
    if found is None or not targets or not takes_texts(backbone_of(model)) or next(model.parameters()).is_meta:
        return None
    name, layers = found
    number = [at for target in targets for at in range(len(layers)) if target.startswith(f"{name}.{at}.")]
    if len(number) < len(targets) or min(number) == 0:
        return None
    prefix = Prefix(model, min(number), routing)
    if _agrees(prefix):
        return prefix
    prefix.remove()
    return None


@dataclass(frozen=True)
class _ShortTexts:
    ids: Tensor
    mask: Tensor

    @property
    def lengths(self) -> Int[np.ndarray, "n"]:
        return self.mask.sum(1).cpu().numpy()

    def batch(self, rows: Rows) -> Mapping[str, Tensor]:
        return {"input_ids": self.ids[rows], "attention_mask": self.mask[rows]}


def _agrees(prefix: Prefix) -> bool:
    """Whether passes that begin with kept states give what whole passes give, in packed rows and padded."""
    routing, device = prefix.routing, next(prefix.backbone.parameters()).device
    texts, rows, found = _ShortTexts(*short_texts(device)), np.arange(3), []
    try:
        for kept, packing in ((False, False), (True, False), (True, True)):
            if kept:
                prefix.keep(texts, [rows], budget=1 << 20)
                prefix.ready(rows)
            routing.set(torch.zeros(3, dtype=torch.long, device=device))
            routing.examples, routing.packing = rows if kept else None, packing
            with torch.inference_mode():
                found.append(prefix.backbone(**texts.batch(rows))[0][texts.mask.bool()])
    except (TypeError, ValueError, RuntimeError, IndexError, KeyError):  # whatever a model says to this
        return False
    finally:
        routing.examples, routing.packing, routing.pending = None, False, None
        prefix._empty()
    return agree(found[1], found[0]) and agree(found[2], found[0])
