"""How clients' rows share passes, and how clients are dealt to workers."""

from collections.abc import Iterator, Mapping, Sequence
from typing import TypeVar

import numpy as np

from fedtri.execution.executor import Rows

T = TypeVar("T")


def pooled(rows: Sequence[Rows]) -> tuple[Rows, Rows]:
    """(owners, rows): everyone's rows end to end, and whose each one is."""
    owners = np.repeat(np.arange(len(rows)), [len(own) for own in rows])
    return owners, np.concatenate(rows).astype(np.int64)


def next_of(minibatch: Mapping[int, Iterator[Rows]]) -> dict[int, Rows]:
    """The next minibatch of each client that has one."""
    found = {place: next(rows, None) for place, rows in minibatch.items()}
    return {place: rows for place, rows in found.items() if rows is not None}


def dealt(items: Sequence[T], weights: Sequence[float], count: int) -> list[list[T]]:
    """The items in so many lists, heaviest first to the least laden."""
    shares: list[list[T]] = [[] for _ in range(count)]
    load = np.zeros(count)
    for index in np.argsort(-np.asarray(weights), kind="stable"):
        least = int(load.argmin())
        shares[least].append(items[index])
        load[least] += weights[index]
    return shares


def merged(parts: Sequence[dict[int, T]]) -> dict[int, T]:
    """All entries of disjoint dictionaries."""
    return {key: value for part in parts for key, value in part.items()}
