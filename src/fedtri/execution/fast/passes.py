"""What one pass through a model holds: whose texts, where each lies, and which tokens are read of the last layer.

A `Pass` is made once for a batch and handed to every layer; nothing in it changes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fedtri.adapters.model import Adapter
from fedtri.execution.fast.attention import Attending, laid
from fedtri.execution.fast.linear import Runs
from fedtri.execution.fast.packing import Places, rows_for


@dataclass(frozen=True)
class View:
    """What one layer computes: whose tokens enter it, whose leave it, and who attends to whom."""

    entering: Runs
    leaving: Runs
    attending: Attending
    read: Int[Tensor, "leaving"] | None = None
    """Which of the tokens that enter leave the layer; None: all."""

    def kept(self, x: Float[Tensor, "entering d"]) -> Float[Tensor, "leaving d"]:
        """The tokens that leave, of those that enter."""
        return x if self.read is None else x.index_select(0, self.read)


@dataclass(frozen=True)
class Pass:
    """Texts of one or several clients, end to end."""

    ids: Int[Tensor, "batch longest"]
    """The texts as they came, padded on the right."""
    types: Int[Tensor, "batch longest"] | None
    real: Bool[Tensor, "batch longest"]
    """Where `ids` holds a token."""
    positions: Int[Tensor, "tokens"]
    """Of each token within its text, in the order in which `real` is true; those that fill up behind."""
    fill: int
    """Tokens behind the last text, which nobody reads, that make their number a round one."""
    states: Float[Tensor, "real_tokens d"] | None
    """What enters the first adapted layer, where that is known already; None: the texts pass through all layers."""
    inner: View
    """Of every layer but the last."""
    last: View
    texts: Runs
    """Whose each text is."""

    def flat(self, grid: Int[Tensor, "batch longest"]) -> Int[Tensor, "real_tokens"]:
        """The numbers that a padded batch has for its tokens, end to end."""
        return grid[self.real]

    def filled(self, x: Float[Tensor, "real_tokens d"]) -> Float[Tensor, "tokens d"]:
        """The texts' tokens, with those that fill up behind them."""
        return x if not self.fill else torch.cat([x, x[:1].expand(self.fill, -1)])


Bias = Callable[[Int[Tensor, "rows queries keys"]], Float[Tensor, "rows heads queries keys"]]
"""What a model adds to attention's scores by how far a key lies behind its query."""


@dataclass(frozen=True)
class Shape:
    """What laying texts out needs to know of an architecture."""

    heads: int
    groups: int = 1
    """Query heads that share one key and value head."""
    causal: bool = False
    windows: frozenset[int | None] = frozenset({None})
    """How far back layers look: None for those that look at the whole text."""
    bias: Bias | None = None
    dtype: torch.dtype = torch.float32
    fill: int = 1
    """To what multiple the number of tokens is filled up."""


def lay_out(
    shape: Shape,
    ids: Int[Tensor, "batch longest"],
    real: Bool[Tensor, "batch longest"],
    types: Int[Tensor, "batch longest"] | None,
    read: Bool[Tensor, "batch longest"] | None,
    adapters: Sequence[Adapter],
    owners: Int[np.ndarray, "batch"],
    states: Float[Tensor, "real_tokens d"] | None = None,
) -> Pass:
    """The pass of a batch of texts.

    Args:
        read: The tokens that are read of the last layer, at least one of each text; None: all.
        adapters: The clients; empty where none has an adapter.
        owners: For each text the place of its client in `adapters`, in ascending order.
    """
    device, lengths = ids.device, real.sum(1).cpu().numpy()
    fill = -int(lengths.sum()) % shape.fill
    sizes, whose = lengths.tolist(), owners.tolist()
    if fill:
        sizes, whose = [*sizes, fill], [*whose, whose[-1]]
    places = rows_for(sizes, whose)
    text_of = np.repeat(np.arange(len(sizes)), sizes)
    positions = np.arange(len(text_of)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    owner_of = np.asarray(whose)[text_of]
    entering = _runs(adapters, owner_of)
    source, at = (torch.from_numpy(value).to(device) for value in (places.source, places.places))
    keys = laid(source, at, shape.heads, shape.groups)
    grid = np.arange(places.texts.size).reshape(places.texts.shape)
    masks = {window: _mask(shape, places, grid, window, device) for window in shape.windows}
    asking = keys if shape.groups == 1 else laid(source, at, shape.heads)
    inner = last = View(entering, entering, Attending(asking, keys, masks))
    if read is not None:
        chosen = np.flatnonzero(read[real].cpu().numpy())
        among, asked = _asking(places, chosen)
        masks = {window: _mask(shape, places, asked, window, device) for window in shape.windows}
        sources = torch.from_numpy(np.searchsorted(chosen, places.source.ravel()[asked])).to(device)
        queries = laid(sources, torch.from_numpy(among).to(device), shape.heads)
        last = View(
            entering, _runs(adapters, owner_of[chosen]), Attending(queries, keys, masks),
            torch.from_numpy(chosen).to(device),
        )  # fmt: skip
    if fill:
        positions[-fill:] = 0
    return Pass(
        ids=ids, types=types, real=real, positions=torch.from_numpy(positions).to(device), fill=fill, states=states,
        inner=inner, last=last, texts=_runs(adapters, owners),
    )  # fmt: skip


def _runs(adapters: Sequence[Adapter], owner_of: Int[np.ndarray, "n"]) -> Runs:
    """Each client's run of rows, given whose each row is, in ascending order."""
    if not adapters:
        return Runs((), ())
    ends = np.searchsorted(owner_of, np.arange(len(adapters)), side="right").tolist()
    bounds = list(zip([0, *ends[:-1]], ends, strict=True))
    own = [number for number, (start, stop) in enumerate(bounds) if stop > start]
    return Runs(tuple(adapters[number] for number in own), tuple(bounds[number] for number in own))


def _asking(
    places: Places, chosen: Int[np.ndarray, "asking"]
) -> tuple[Int[np.ndarray, "asking"], Int[np.ndarray, "rows queries"]]:
    """Rows of queries beside the rows of keys.

    Returns where each chosen token asks, counted over (rows, queries); and for each query which place of the rows of
    keys it stands for, the row's first query where there are fewer.
    """
    width = places.texts.shape[1]
    at = places.places[chosen]
    order = np.argsort(at, kind="stable")
    row = at[order] // width
    counts = np.bincount(row, minlength=len(places.texts))
    begins = np.cumsum(counts) - counts
    column = np.arange(len(at)) - begins[row]
    begins = np.minimum(begins, len(at) - 1)  # a row of what fills up alone asks nothing: one of its neighbours' does
    most = int(counts.max())
    asked = np.repeat(at[order][begins], most).reshape(len(counts), most)
    asked[row, column] = at[order]
    among = np.empty(len(at), np.int64)
    among[order] = row * most + column
    return among, asked


def _mask(
    shape: Shape, places: Places, asked: Int[np.ndarray, "rows queries"], window: int | None, device: torch.device
) -> Float[Tensor, "rows heads_or_1 queries width"]:
    """0 where a query may look and the type's least number where not; with the model's bias, where it has one."""
    texts, positions = places.texts.ravel(), places.positions.ravel()
    apart = texts[asked][:, :, None] != places.texts[:, None, :]
    back = positions[asked][:, :, None] - places.positions[:, None, :]  # how far a key lies behind its query
    if shape.causal:
        apart |= back < 0
    if window is not None:
        apart |= back >= window
    mask = torch.zeros(apart.shape, dtype=shape.dtype, device=device)
    mask = mask.masked_fill_(torch.from_numpy(apart).to(device), torch.finfo(shape.dtype).min)[:, None]
    if shape.bias is None:
        return mask
    return mask + shape.bias(torch.from_numpy(back).to(device))


def scattered(x: Float[Tensor, "n d"], where: Bool[Tensor, "*grid"]) -> Float[Tensor, "*grid d"]:
    """Rows laid where `where` is true, in its order; zeros elsewhere."""
    grid = x.new_zeros(where.numel(), x.shape[-1])
    return grid.index_copy(0, torch.nonzero(where.flatten())[:, 0], x).unflatten(0, where.shape)
