"""A batch of several clients' texts through one frozen model, which tasks call as they would the model itself."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fedtri.adapters.model import AdaptedModel, Adapter
from fedtri.execution.fast.passes import Pass, Runs, Shape, lay_out, scattered
from fedtri.execution.fast.table import architecture_of, head_of


@dataclass(frozen=True)
class Logits:
    """What the whole model gives."""

    logits: Tensor


@dataclass(frozen=True)
class Hidden:
    """What the backbone gives."""

    last_hidden_state: Float[Tensor, "batch longest d"]


@dataclass(frozen=True)
class Frozen:
    """What does not change from batch to batch."""

    adapted: AdaptedModel
    first: int = 0
    """The first layer that has an adapter: what enters it is the same for all clients."""
    recompute: bool = False
    """Whether layers keep no activations for the backward pass, and are run again in it."""
    fill: int = 1
    """To what multiple a pass's tokens are filled up."""

    @property
    def backbone(self) -> Any:
        """The pretrained model beneath the head."""
        return self.adapted.model.base_model

    @property
    def shape(self) -> Shape:
        """What laying texts out needs to know."""
        found = architecture_of(self.adapted.model).shape(self.backbone)
        return Shape(**{**vars(found), "fill": self.fill})

    def below(self, at: Pass) -> Float[Tensor, "real_tokens d"]:
        """What enters the first adapted layer."""
        own = architecture_of(self.adapted.model)
        x, shared = at.filled(own.embed(self.backbone, at)), own.shared(self.backbone, at)
        for layer in own.layers(self.backbone)[: self.first]:
            x = own.layer(layer, x, at.inner, shared)
        return x[: len(x) - at.fill]

    def run(self, at: Pass) -> Float[Tensor, "read d"]:
        """The tokens that are read of the last layer, behind it."""
        own, backbone = architecture_of(self.adapted.model), self.backbone
        x = at.filled(own.embed(backbone, at) if at.states is None else at.states)
        shared, layers = own.shared(backbone, at), own.layers(backbone)
        for number in range(0 if at.states is None else self.first, len(layers)):
            view = at.last if number == len(layers) - 1 else at.inner
            x = self._layer(own.layer)(layers[number], x, view, shared)
        x = own.finish(backbone, x)
        return x if at.last.read is not None or not at.fill else x[: len(x) - at.fill]

    def _layer(self, layer: Callable[..., Tensor]) -> Callable[..., Tensor]:
        if not (self.recompute and torch.is_grad_enabled()):
            return layer
        return partial(checkpoint, layer, use_reentrant=False, preserve_rng_state=False)


@dataclass(frozen=True)
class SharedPass:
    """One batch of clients' texts, ready for a task to ask for logits or hidden states, as it would of the model."""

    frozen: Frozen
    adapters: Sequence[Adapter]
    """The clients; empty: none of the texts meets an adapter."""
    owners: Int[np.ndarray, "batch"]
    """For each text of the batch the place of its client in `adapters`, in ascending order."""
    states: Float[Tensor, "real_tokens d"] | None = None
    """What enters the first adapted layer of these texts, end to end, where that is kept."""

    @property
    def config(self) -> Any:
        """The model's configuration."""
        return self.frozen.adapted.model.config

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.frozen.adapted.device

    @property
    def base_model(self) -> Callable[..., Hidden]:
        """The backbone of this batch."""
        return self._hidden

    def __call__(self, **inputs: Any) -> Logits:
        """See `forward`."""
        return self.forward(**inputs)

    def forward(
        self,
        input_ids: Int[Tensor, "batch longest"],
        attention_mask: Int[Tensor, "batch longest"] | None = None,
        token_type_ids: Int[Tensor, "batch longest"] | None = None,
        *,
        use_cache: bool = False,
        logits_to_keep: Int[Tensor, "columns"] | None = None,
    ) -> Logits:
        """The whole model's scores: one row a text, or one a token, zeros where there is none.

        Args:
            logits_to_keep: The columns of the batch whose tokens' scores are wanted; None: all.
        """
        real, model = _real(input_ids, attention_mask), self.frozen.adapted.model
        head = head_of(model)
        assert head is not None
        read = None
        if head.reads == "first":
            read = torch.zeros_like(real)
            read[:, 0] = True
        elif head.reads == "last":
            read = _last(input_ids, model.config)
        elif logits_to_keep is not None:
            read = torch.zeros_like(real)
            read[:, logits_to_keep] = True
            read &= real
            read[:, 0] |= ~read.any(1)  # of a text that none is wanted of, one
        at = self._pass(input_ids, real, token_type_ids, read)
        x = self.frozen.run(at)
        if head.reads != "all":
            return Logits(head.logits(model, x, at.texts))
        whose = at.last.leaving if not at.fill or read is not None else _without(at.last.leaving, len(x))
        logits = scattered(head.logits(model, x, whose), real if read is None else read)
        return Logits(logits if logits_to_keep is None else logits[:, logits_to_keep])

    def below(
        self,
        input_ids: Int[Tensor, "batch longest"],
        attention_mask: Int[Tensor, "batch longest"] | None = None,
        token_type_ids: Int[Tensor, "batch longest"] | None = None,
    ) -> Float[Tensor, "real_tokens d"]:
        """What enters the first adapted layer, end to end."""
        return self.frozen.below(self._pass(input_ids, _real(input_ids, attention_mask), token_type_ids, None))

    def _hidden(
        self,
        input_ids: Int[Tensor, "batch longest"],
        attention_mask: Int[Tensor, "batch longest"] | None = None,
        token_type_ids: Int[Tensor, "batch longest"] | None = None,
        **more: Any,
    ) -> Hidden:
        real = _real(input_ids, attention_mask)
        return Hidden(scattered(self.frozen.run(self._pass(input_ids, real, token_type_ids, None)), real))

    def _pass(self, ids: Tensor, real: Tensor, types: Tensor | None, read: Tensor | None) -> Pass:
        shape = self.frozen.shape
        states = None if self.states is None else self.states.to(ids.device, shape.dtype)
        return lay_out(shape, ids, real, types, read, self.adapters, self.owners, states)


def _real(ids: Tensor, mask: Tensor | None) -> Bool[Tensor, "batch longest"]:
    if mask is None:
        return torch.ones_like(ids, dtype=torch.bool)
    real = mask.bool()
    assert bool(real[:, 0].all()), "texts are padded on the right"
    return real


def _last(ids: Tensor, config: Any) -> Bool[Tensor, "batch longest"]:
    """Each text's last token that is no padding token, as transformers' classifiers on decoders take it."""
    columns = torch.arange(ids.shape[1], device=ids.device)
    pad = config.pad_token_id
    last = columns[-1:].expand(len(ids)) if pad is None else (columns * (ids != pad)).argmax(1)
    return columns == last[:, None]


def _without(runs: Runs, total: int) -> Runs:
    """The runs of the first `total` rows."""
    return Runs(runs.adapters, tuple((start, min(stop, total)) for start, stop in runs.bounds))
