"""What the fast executor knows of an architecture: functions over transformers' own frozen modules.

A layer is a plain function of (the layer's module, the tokens end to end, a View, what all layers share). It calls
`linear.apply` for every linear layer that may have an adapter, and `attention.attend`; normalisations and activations
are the module's own. Dropout is left out, since it is off.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from jaxtyping import Float
from torch import Tensor

from fedtri.execution.fast.linear import Runs
from fedtri.execution.fast.passes import Pass, Shape, View

Layer = Callable[[Any, Tensor, View, Any], Tensor]
"""(module, tokens that enter, view, what is shared) to the tokens that leave."""


@dataclass(frozen=True)
class Head:
    """What stands on the last layer."""

    reads: Literal["first", "last", "all"]
    """Which tokens of a text it reads; "last" is the last that is no padding token."""
    logits: Callable[[Any, Float[Tensor, "read d"], Runs], Float[Tensor, "read outputs"]]
    """(the whole model, the tokens read, whose they are) to the scores."""


@dataclass(frozen=True)
class Architecture:
    """A family of models whose forward pass is written out here."""

    layers: Callable[[Any], Sequence[Any]]
    """The backbone's layers, in order."""
    embed: Callable[[Any, Pass], Float[Tensor, "real_tokens d"]]
    """(backbone, pass) to what enters the first layer."""
    layer: Layer
    shape: Callable[[Any], Shape]
    """What laying out needs to know of this backbone."""
    heads: Mapping[str, Head]
    """By what the model's class is called behind its family's name: "ForSequenceClassification" and the like."""
    finish: Callable[[Any, Float[Tensor, "n d"]], Float[Tensor, "n d"]] = lambda backbone, x: x
    """What the backbone does behind its last layer."""
    shared: Callable[[Any, Pass], Any] = lambda backbone, at: None
    """What all layers are handed, made once a pass."""
    refuses: Mapping[str, Callable[[Any], bool]] = field(default_factory=dict)
    """Why a configuration is not one that is written out here, and how it is told."""
