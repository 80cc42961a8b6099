"""Which client each sample of a pass belongs to."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor


class Routing(threading.local):
    """Which client each sample of the current batch belongs to; shared by all layers of a cohort, apart by thread.

    Within a backbone whose texts lie end to end (packing.py) each token is a sample.
    """

    def __init__(self) -> None:
        self.slots: Tensor | None = None
        self.single: int | None = None
        self._runs: list[tuple[int, int, int]] | None = None
        self.packing = False
        """Whether the next batch may be packed."""
        self.pending: Any = None
        """What packing has to undo."""
        self.first_only = False
        """Whether the pass that runs needs each text's first token only from the last layer."""
        self.whole: Any = None
        """What a layer got that computes first tokens alone, and its routing, until its output is laid back."""
        self.examples: Any = None
        """Which examples the next batch holds, by row, where prefix.py keeps what enters their first adapted layer."""
        self.computing = False
        """Whether the next pass is to find out what to keep of them."""
        self.prefix: Any = None
        """What prefix.py has to do in the pass that runs."""

    def set(self, slots: Int[Tensor, "batch"]) -> None:
        """Route sample i of the next batches to the factors in slot slots[i]."""
        self.slots, self._runs = slots, None
        first = int(slots[0])
        self.single = first if bool((slots == first).all()) else None

    def runs(self) -> list[tuple[int, int, int]]:
        """(slot, first sample, one past its last) of each run of samples of one client, in the batch's order."""
        assert self.slots is not None, "route the batch before the model sees it"
        if self._runs is None:
            slots, counts = torch.unique_consecutive(self.slots, return_counts=True)
            ends = counts.cumsum(0).tolist()
            self._runs = list(zip(slots.tolist(), [0, *ends[:-1]], ends, strict=True))
        return self._runs

    @contextmanager
    def once_a_client(self, copies: int) -> Iterator[Int[Tensor, "batch"]]:
        """For what each client of a batch computes once: inside, a pass holds `copies` samples of every such client,
        client by client. Yields, for each sample of the batch, which of these clients is its own.
        """
        assert self.slots is not None, "route the batch before the model sees it"
        clients, own = torch.unique(self.slots, return_inverse=True)
        with self.routed(clients.repeat_interleave(copies)):
            yield own

    @contextmanager
    def routed(self, slots: Int[Tensor, "batch"]) -> Iterator[None]:
        """These slots while it lasts, then what was before."""
        before = self.slots, self.single, self._runs
        self.set(slots)
        try:
            yield
        finally:
            self.slots, self.single, self._runs = before

    def pick(self, stacked: Float[Tensor, "m *shape"]) -> Float[Tensor, "batch *shape"]:
        """Each sample's own slice of a stacked tensor; one broadcast slice when the batch is of one client."""
        if self.single is not None:
            return stacked[self.single : self.single + 1]
        assert self.slots is not None, "route the batch before the model sees it"
        return stacked.index_select(0, self.slots)

    def rows(self, x: Float[Tensor, "..."]) -> Float[Tensor, "batch tokens d"]:
        """Any activation whose leading dimension is (a multiple of) the batch, as one row of tokens a sample."""
        if self.single is not None:
            return x.reshape(1, -1, x.shape[-1])
        assert self.slots is not None, "route the batch before the model sees it"
        return x.reshape(len(self.slots), -1, x.shape[-1])

    def each(
        self, rows: Float[Tensor, "batch tokens d"], through: Callable[[int, Tensor], Tensor]
    ) -> Float[Tensor, "batch tokens d_out"]:
        """Every client's rows through `through(slot, rows)`, one call a client: for what is too large to gather."""
        if self.single is not None:
            return through(self.single, rows)
        assert self.slots is not None, "route the batch before the model sees it"
        order = torch.argsort(self.slots, stable=True)
        slots, counts = torch.unique_consecutive(self.slots[order], return_counts=True)
        parts = rows[order].split(counts.tolist())
        done = [through(slot, part) for slot, part in zip(slots.tolist(), parts, strict=True)]
        return torch.cat(done)[torch.argsort(order)]
