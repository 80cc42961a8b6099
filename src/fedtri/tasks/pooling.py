"""One vector for a text. The sketches of language tasks are made of these vectors."""

from jaxtyping import Float
from torch import Tensor

from fedtri.tasks.base import Batch, Model


def mean_pooled(model: Model, inputs: Batch) -> Float[Tensor, "batch d"]:
    """The backbone's last hidden states, averaged over real tokens."""
    hidden = model.base_model(**inputs).last_hidden_state  # (batch, tokens, d)
    if (mask := inputs.get("attention_mask")) is None:
        return hidden.mean(1)
    weight = mask.to(hidden.dtype)[..., None]
    return (hidden * weight).sum(1) / weight.sum(1)
