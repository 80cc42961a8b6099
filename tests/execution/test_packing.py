"""Rows of texts: every text whole, in one row of its own client, in rows that suit the processor."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from fedtri.execution.fast.packing import WIDTH, Places, laid, rows_for

TEXTS = st.lists(st.tuples(st.integers(1, 300), st.integers(0, 3)), min_size=1, max_size=40)


def row_of(places: Places, text: int, lengths: list[int]) -> int:
    """The row in which a text lies, from one place to the next."""
    where, n, start = np.argwhere(places.texts == text), lengths[text], sum(lengths[:text])
    assert len(where) == n
    (row,) = set(where[:, 0].tolist())
    assert np.array_equal(where[:, 1], np.arange(n) + where[0, 1])
    assert np.array_equal(places.positions[places.texts == text], np.arange(n))
    assert np.array_equal(places.source[places.texts == text], np.arange(start, start + n))
    assert np.array_equal(places.places[start : start + n], where[:, 0] * places.texts.shape[1] + where[:, 1])
    return row


@given(TEXTS)
def test_rows_hold_every_text_whole_and_are_of_one_client_each(texts):
    """Seen to fail with rows of any client, and with the width that texts fill in place of the next multiple."""
    lengths, owners = [n for n, _ in texts], [owner for _, owner in texts]
    places = rows_for(lengths, owners)
    assert places.texts.shape[1] % WIDTH == 0
    assert int((places.texts >= 0).sum()) == sum(lengths) == len(places.places)
    owner = np.repeat(owners, lengths)
    assert (owner[places.source] == owner[places.source[:, :1]]).all()
    for text in range(len(lengths)):
        row_of(places, text, lengths)


def test_rows_by_hand():
    """Texts of 2, 3 and 1 tokens, the first and last in one row of four places. An empty one has its row's first."""
    places = laid([[0, 2], [1]], [2, 3, 1], 4)
    assert places.texts.tolist() == [[0, 0, 2, -1], [1, 1, 1, -1]]
    assert places.positions.tolist() == [[0, 1, 0, 0], [0, 1, 2, 0]]
    assert places.source.tolist() == [[0, 1, 5, 0], [2, 3, 4, 2]]
    assert places.places.tolist() == [0, 1, 4, 5, 6, 2]
