"""What every source becomes: one table of texts and label ids, checked once, before it is dealt out."""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
import pyarrow as pa

from fedtri.errors import FedtriError
from fedtri.seeds import derive

OWN = ("text", "text_pair", "label")
DEFAULT_TEXTS = ("text", "sentence")


@dataclass(frozen=True)
class Pool:
    """All examples of a federation before they are dealt to clients.

    `table` has the columns "text" (str), "text_pair" (str, for tasks on two texts) and "label" (int64, an
    index into `label_names`); the source's further columns keep their names, for natural partitions.
    """

    name: str
    table: datasets.Dataset
    label_names: tuple[str, ...]


@dataclass(frozen=True)
class Source:
    """A table as it was found, and which of its columns are meant."""

    name: str
    where: str
    """The file, folder or hub name that errors point to."""
    table: pa.Table
    text_columns: Sequence[str] = ()
    label_column: str | None = None
    label_names: Mapping[Any, str] | None = None
    """The name of each label, in the order of the ids; None: the distinct labels in sorted order."""


def pool_of(source: Source, *, limit: int | None = None, seed: int = 0) -> Pool:
    """The pool of a source, of which `limit` rows drawn with `seed` are kept.

    Raises FedtriError: a missing or unsuitable column, no rows, a text without content, a missing or unknown
    label, fewer than two labels, a label seen once.
    """
    if source.table.num_rows == 0:
        raise FedtriError(f"{source.where}: holds no examples, expected one a row; check the file")
    text_columns, label_column = columns_of(source)
    columns: dict[str, Any] = {own: texts_of(source, column) for own, column in zip(OWN, text_columns, strict=False)}
    columns["label"], names = labels_of(source, label_column)
    further = [name for name in source.table.column_names if name not in {*OWN, *text_columns}]
    table = pa.table(columns | {name: source.table[name] for name in further})
    if limit is not None:
        table = table.take(sample(table.num_rows, limit, seed))
    check_labels(source, label_column, np.asarray(table["label"]), names, limit)
    return Pool(source.name, datasets.Dataset(table), names)


def columns_of(source: Source) -> tuple[Sequence[str], str]:
    """The text columns and the label column, by default ("text" or "sentence") and "label"."""
    found = source.table.column_names
    texts = source.text_columns or [name for name in DEFAULT_TEXTS if name in found][:1] or DEFAULT_TEXTS[:1]
    label = source.label_column or "label"
    if twice := [name for name in found if found.count(name) > 1]:
        raise FedtriError(f'{source.where}: column "{twice[0]}" occurs more than once; rename one of them')
    if len(texts) > 2:
        raise FedtriError(f"text_columns: expected one or two columns, got {len(texts)}: {', '.join(texts)}")
    for key, name in [*(("text_columns", text) for text in texts), ("label_column", label)]:
        if name not in found:
            raise FedtriError(
                f'{source.where}: no column "{name}", found {", ".join(found)}; name the right one with {key}'
            )
    return texts, label


def texts_of(source: Source, column: str) -> pa.ChunkedArray:
    """A column of texts, each of which has content."""
    values = source.table[column]
    if not (pa.types.is_string(values.type) or pa.types.is_large_string(values.type)):
        raise FedtriError(f'{source.where}: column "{column}" holds {values.type}, expected text; see text_columns')
    blank = [row for row, text in enumerate(values.to_pylist(), start=1) if not (text or "").strip()]
    if blank:
        raise FedtriError(
            f'{source.where}: column "{column}" is empty in {len(blank)} of {len(values)} rows, first in '
            f"example {blank[0]}, expected a text; fill these rows in or remove them"
        )
    return values.cast(pa.string())


def labels_of(source: Source, column: str) -> tuple[np.ndarray, tuple[str, ...]]:
    """The label ids (rows,) and the names of the labels."""
    values = source.table[column].to_pylist()
    for row, value in enumerate(values, start=1):
        if value is None or value == "" or value != value or not isinstance(value, Hashable):
            raise FedtriError(
                f'{source.where}: column "{column}" holds no label in example {row}, expected text or a '
                f"whole number, got {value!r}; fill the row in or remove it, or name another label_column"
            )
    names = source.label_names or {value: str(value) for value in in_order(set(values))}
    ids = {value: id for id, value in enumerate(names)}
    if unknown := set(values) - ids.keys():
        raise FedtriError(
            f'{source.where}: column "{column}" holds {min(map(repr, unknown))}, expected one of '
            f"{', '.join(map(repr, ids))}; use a split that has labels"
        )
    return np.array([ids[value] for value in values], dtype=np.int64), tuple(names.values())


def in_order(values: set[Any]) -> list[Any]:
    """Whole numbers by value, even where they are written as text; anything else in its own order."""
    try:
        return sorted(values, key=lambda value: (int(value), str(value)))
    except (ValueError, OverflowError):
        return sorted(values, key=str)


def sample(rows: int, limit: int, seed: int) -> np.ndarray:
    """At most `limit` row numbers, ascending."""
    if limit < 2:
        raise FedtriError(f"limit: expected at least 2 examples, got {limit}")
    chosen = np.random.default_rng(derive(seed, "limit")).permutation(rows)[:limit]
    return np.sort(chosen)


def check_labels(source: Source, column: str, labels: np.ndarray, names: tuple[str, ...], limit: int | None) -> None:
    """At least two labels, none of them seen once: such a one cannot be both trained and tested."""
    counts = np.bincount(labels, minlength=len(names))
    where = f'{source.where}: column "{column}"' + ("" if limit is None else f" within limit = {limit}")
    if (counts > 0).sum() < 2:
        raise FedtriError(f"{where} holds one label, {names[labels[0]]!r}; expected at least two to tell apart")
    if once := [names[label] for label in np.flatnonzero(counts == 1)]:
        more = f" and {len(once) - 1} others" if len(once) > 1 else ""
        remedy = "add or remove such examples, or name another label_column"
        raise FedtriError(
            f"{where} holds the label {once[0]!r}{more} once, expected at least twice, to train and to test; "
            + (remedy if limit is None else "raise limit")
        )
