"""Rows of different lengths, stored end to end. They are padded only when a batch is made."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor


@dataclass(frozen=True)
class Ragged:
    """Row i is values[offsets[i]:offsets[i + 1]]."""

    values: Int[np.ndarray, "total"]
    offsets: Int[np.ndarray, "n_plus_1"]
    lengths: Int[np.ndarray, "n"] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "lengths", np.diff(self.offsets))

    @staticmethod
    def of(rows: Sequence[Sequence[int]]) -> "Ragged":
        """These rows, as int32."""
        ends = np.cumsum([0, *(len(row) for row in rows)], dtype=np.int64)
        return Ragged(np.fromiter(_flat(rows), np.int32, int(ends[-1])), ends)

    def mask(self, rows: Int[np.ndarray, "batch"], *, left: bool = False) -> np.ndarray:
        """(batch, longest) booleans: True where a row has a value. The padding is on the right, or on the left."""
        lengths = self.lengths[rows]
        places = np.arange(int(lengths.max()))
        return places >= places.size - lengths[:, None] if left else places < lengths[:, None]

    def padded(self, rows: Int[np.ndarray, "batch"], mask: np.ndarray, empty: int) -> Tensor:
        """(batch, longest) int64: these rows' values where `mask` is true, `empty` elsewhere."""
        starts, lengths = self.offsets[rows], self.lengths[rows]
        within = np.arange(int(lengths.sum())) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        grid = np.full(mask.shape, empty, np.int64)
        grid[mask] = self.values[np.repeat(starts, lengths) + within]
        return torch.from_numpy(grid)


def _flat(rows: Iterable[Sequence[int]]) -> Iterable[int]:
    return (value for row in rows for value in row)
