"""Whether two values agree, however deep their tensors lie."""

from collections.abc import Mapping
from dataclasses import fields, is_dataclass

import numpy as np
import torch
from torch import Tensor


def assert_same(a: object, b: object, where: str = "", **tolerance: float | int) -> None:
    """Raises AssertionError where two values differ.

    Args:
        a: Plain values, tensors and arrays, in mappings and dataclasses of any depth.
        b: What it should be.
        where: How the values are called in the message.
        tolerance: atol and rtol for tensors; without them, tensors agree bit for bit.
    """
    if isinstance(a, Mapping):
        assert isinstance(b, Mapping), where
        assert a.keys() == b.keys(), where
        for key, value in a.items():
            assert_same(value, b[key], f"{where}[{key}]", **tolerance)
    elif is_dataclass(a):
        for part in fields(a):
            assert_same(getattr(a, part.name), getattr(b, part.name), f"{where}.{part.name}", **tolerance)
    elif isinstance(a, Tensor | np.ndarray):
        found, wanted = torch.as_tensor(a), torch.as_tensor(b)
        atol, rtol = tolerance.get("atol", 0), tolerance.get("rtol", 0)
        torch.testing.assert_close(
            found, wanted, atol=atol, rtol=rtol, equal_nan=True, msg=lambda said: f"{where}: {said}"
        )
    else:
        assert a == b, where
