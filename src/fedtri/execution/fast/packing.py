"""Which text lies where: texts end to end, and attention's short rows, in each of which lie texts of one client.

A layer's products see the texts end to end, so that none is spent on padding. Attention alone lays the tokens into rows
of (rows, width), several texts of a client in each, under a mask that keeps each text to itself.
"""

import bisect
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

WIDTH = 16
"""Rows are as wide as a multiple of this: a processor's vectors hold so many numbers, and what remains is slow."""
WIDER = 64
"""How much wider than the longest text rows may be."""


@dataclass(frozen=True)
class Places:
    """Where the tokens of some texts lie in rows."""

    texts: Int[np.ndarray, "rows width"]
    """Which text a place holds; -1 for none."""
    positions: Int[np.ndarray, "rows width"]
    """Of a place's token within its text."""
    source: Int[np.ndarray, "rows width"]
    """Which token, counted text by text, a place holds; the row's first where it holds none."""
    places: Int[np.ndarray, "tokens"]
    """In which place, of all rows end to end, each token is."""


def rows_for(lengths: Sequence[int], owners: Sequence[int]) -> Places:
    """Rows as wide as makes attention cheapest, about W (W + 16) for each.

    Of one client each: where its numbers are no numbers any more, a mask would not keep them from others in its row.
    """
    texts_of: dict[int, list[int]] = {owner: [] for owner in sorted(set(owners))}
    for text in sorted(range(len(owners)), key=lambda text: -lengths[text]):
        texts_of[owners[text]].append(text)
    least = -(-max(lengths) // WIDTH) * WIDTH
    found = {
        width: [row for texts in texts_of.values() for row in _fill(texts, lengths, width)]
        for width in range(least, least + WIDER + 1, WIDTH)
    }
    width = min(found, key=lambda width: len(found[width]) * width * (width + 16))
    return laid(found[width], lengths, width)


def laid(rows: Sequence[Sequence[int]], lengths: Sequence[int], width: int) -> Places:
    """These texts in rows of this width, each row's one after the other."""
    sizes = np.asarray(lengths)
    starts = np.cumsum(sizes) - sizes  # of each text's tokens
    order = np.array([text for row in rows for text in row])
    row_of = np.repeat(np.arange(len(rows)), [len(row) for row in rows])
    ends = np.cumsum(sizes[order])
    begins = ends - sizes[order]  # of each text in `order`, if all rows were end to end without gaps
    first_of_row = np.searchsorted(row_of, np.arange(len(rows)))
    within_row = begins - begins[first_of_row][row_of]
    text = np.repeat(order, sizes[order])
    position = np.arange(len(text)) - np.repeat(begins, sizes[order])
    place = np.repeat(row_of * width + within_row, sizes[order]) + position
    source = np.repeat(starts[order[first_of_row]], width)
    source[place] = starts[text] + position
    texts, positions = np.full(len(rows) * width, -1), np.zeros(len(rows) * width, np.int64)
    texts[place], positions[place] = text, position
    places = np.empty(len(text), np.int64)
    places[source[place]] = place
    shape = (len(rows), width)
    return Places(texts.reshape(shape), positions.reshape(shape), source.reshape(shape), places)


def _fill(texts: Sequence[int], lengths: Sequence[int], width: int) -> list[list[int]]:
    """Texts, longest first, each put into the fullest row that has room for it."""
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # of each row, sorted
    for text in texts:
        n = lengths[text]
        fitting = bisect.bisect_left(room, (n, 0))
        if fitting == len(room):
            rows.append([])
            left, row = width, len(rows) - 1
        else:
            left, row = room.pop(fitting)
        rows[row].append(text)
        bisect.insort(room, (left - n, row))
    return rows
