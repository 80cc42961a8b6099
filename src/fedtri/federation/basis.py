"""A client's half of a basis from gradients: the gradient of its own loss, as its leading factors."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from fedtri.adapters.layout import Factors, Key
from fedtri.adapters.subspace import leading
from fedtri.errors import FedtriError
from fedtri.execution.executor import Reduce, Rows
from fedtri.seeds import derive, generator


def drawn(train: Rows, count: int, seed: int, client: str) -> Rows:
    """The training examples from which a client's gradient is computed: `count` of them, or all, in ascending order."""
    order = np.random.default_rng(derive(seed, "basis", client)).permutation(train)
    return np.sort(order[:count])


def leading_factors(count: int, seed: int, client: str) -> Reduce:
    """(a client's gradients) to B = U√σ (d_out, count) and A = √σVᵀ (count, d_in) of every layer, in float32 or wider.

    Raises FedtriError where a gradient is not finite.
    """

    def reduce(gradients: Mapping[str, Tensor]) -> Factors:
        found: dict[Key, Tensor] = {}
        for layer, gradient in gradients.items():
            if not bool(gradient.isfinite().all()):
                raise FedtriError(
                    f"basis: the gradient of {client} in {layer} is not finite; "
                    'set model_options.dtype = "float32", or choose another basis'
                )
            U, S, V = leading(gradient, count, generator(seed, "basis", client, layer))
            root = S.sqrt()
            dtype = torch.promote_types(gradient.dtype, torch.float32)
            found[Key(layer, "B")] = (U * root).to("cpu", dtype)
            found[Key(layer, "A")] = (V * root).mT.to("cpu", dtype).contiguous()
        return found

    return reduce
