"""Layers below the first adapter never learn: what leaves them is computed once for each example, and kept.

The hidden states that enter the first adapted layer are laid end to end, one example after the other. A pass over
examples that are kept starts from there. Examples are computed in groups that depend on the run's settings alone, so
that a resumed run finds the same numbers.
"""

import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from fedtri.errors import FedtriError
from fedtri.execution.executor import Rows
from fedtri.execution.workers import empty_shared


@dataclass(frozen=True)
class Keeping:
    """Which examples' states to keep, and where."""

    rows: Sequence[Rows]
    """Examples that a run meets more than once; none stands in two of these lists."""
    budget: int
    """Bytes of memory; states that take more lie in a file."""
    folder: Path | None = None
    """Where that file is; it has no name, and is gone with the run."""
    dtype: torch.dtype | None = None
    """Of the kept states; None: the model's own, which changes no result."""


class KeptStates:
    """What enters the first adapted layer, of every example that is kept."""

    def __init__(
        self,
        keeping: Keeping,
        groups: Sequence[Rows],
        lengths: Int[np.ndarray, "examples"],
        compute: Callable[[Rows], Float[Tensor, "tokens d"]],
    ) -> None:
        """Nothing is computed yet.

        Args:
            groups: The examples of `keeping`, cut into what is computed at once.
            lengths: Tokens of each example, of all there are.
            compute: The states of these examples, end to end.
        """
        self._keeping, self._groups, self._compute, self._lengths = keeping, groups, compute, lengths
        self._group = np.full(len(lengths), -1)  # of each example; -1: not kept
        for number, rows in enumerate(groups):
            self._group[rows] = number
        kept = np.flatnonzero(self._group >= 0)
        ends = np.cumsum(lengths[kept])
        self._start = np.zeros(len(lengths), np.int64)
        self._start[kept] = ends - lengths[kept]
        self._total = int(ends[-1]) if len(kept) else 0
        self._states: Tensor | None = None
        self._done = empty_shared((len(groups),), torch.bool).fill_(False).numpy()

    def open(self) -> None:
        """Make room for the states, before processes fork that are to share it; the first group tells how much."""
        if self._states is None and self._groups:
            self.of(self._groups[0])

    def of(self, rows: Rows) -> Float[Tensor, "tokens d"] | None:
        """The states of these examples, end to end, what is missing computed now; None where one is not kept."""
        if not len(rows) or (self._group[rows] < 0).any():
            return None
        for number in np.unique(self._group[rows]):
            if not self._done[number]:
                group = self._groups[number]
                with torch.inference_mode(False), torch.no_grad():
                    self._store(self._places(group), self._compute(group))
                self._done[number] = True
        assert self._states is not None
        return self._states.index_select(0, self._places(rows))

    def _places(self, rows: Rows) -> Int[Tensor, "tokens"]:
        lengths = self._lengths[rows]
        within = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        return torch.from_numpy(np.repeat(self._start[rows], lengths) + within)

    def _store(self, places: Int[Tensor, "tokens"], states: Float[Tensor, "tokens d"]) -> None:
        if self._states is None:
            self._states = self._room(states.shape[1], self._keeping.dtype or states.dtype)
        self._states[places] = states.to(self._states)

    def _room(self, width: int, dtype: torch.dtype) -> Float[Tensor, "total d"]:
        """Memory for all states; where that is over the budget, a file's that has no name any more."""
        size, folder = self._total * width * dtype.itemsize, self._keeping.folder
        if size <= self._keeping.budget:
            return empty_shared((self._total, width), dtype)
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
        handle, path = tempfile.mkstemp(prefix="prefix-", dir=folder)
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
