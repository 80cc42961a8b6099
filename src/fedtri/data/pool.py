"""What every source becomes: one table whose columns have been given roles and checked, before it is dealt out.

A task decides which roles it needs; the functions here find a role's column, check it, and make the pool.
"""

from collections.abc import Collection, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from jaxtyping import Int

from fedtri.errors import FedtriError
from fedtri.seeds import derive

ROLES: dict[str, tuple[str, ...]] = {
    "text": ("text", "sentence"),
    "text_pair": (),
    "label": ("label",),
    "prompt": ("prompt", "question", "instruction"),
    "response": ("response", "answer", "completion", "output"),
    "messages": ("messages", "conversation", "conversations"),
    "tokens": ("tokens", "words"),
    "tags": ("tags", "ner_tags", "pos_tags"),
    "image": ("image",),
}
"""What a column may be to a task, and the names it is looked for under where [columns] does not say."""


@dataclass(frozen=True)
class Pool:
    """All examples of a federation before they are dealt to clients.

    `table` has a column for each role that the task uses, under the role's name; "label" is int64, an index into
    `label_names`. The source's further columns keep their names, for natural partitions.
    """

    name: str
    table: datasets.Dataset
    label_names: tuple[str, ...] = ()
    """The names of the classes (or of words' tags, or of domains); empty where there are none."""

    @property
    def labels(self) -> Int[np.ndarray, "rows"] | None:
        """The class of each example; None where an example as a whole has none."""
        return np.asarray(self.table["label"][:]) if "label" in self.table.column_names else None


@dataclass(frozen=True)
class Source:
    """A table as it was found, and which of its columns are meant."""

    name: str
    where: str
    """The file, folder or hub name that errors point to."""
    table: pa.Table
    columns: Mapping[str, str] = field(default_factory=dict)
    """The column of each role that is not where its role's default is."""
    names: Mapping[str, Mapping[Any, str]] = field(default_factory=dict)
    """By column, the name of each value in the order of the ids; others: the distinct values in sorted order."""
    limit: int | None = None
    """At most so many examples, drawn with `seed`."""
    seed: int = 0
    classes: tuple[str, ...] = ()
    """All classes of a federation in the order of their ids, where the table is one site's share of its data."""


def column(source: Source, role: str) -> str:
    """The column of a role. Raises FedtriError where there is none."""
    name = optional(source, role)
    if name is None:
        raise FedtriError(
            f'{source.where}: no column "{ROLES[role][0]}", found {", ".join(source.table.column_names)}; '
            f"name the right one with columns.{role}"
        )
    return name


def optional(source: Source, role: str) -> str | None:
    """The column of a role, None where there is none. Raises FedtriError where the one asked for is not there."""
    found = source.table.column_names
    if (name := source.columns.get(role)) is None:
        return next((name for name in ROLES[role] if name in found), None)
    if name not in found:
        raise FedtriError(
            f'{source.where}: no column "{name}", found {", ".join(found)}; name the right one with columns.{role}'
        )
    return name


def texts(source: Source, role: str) -> pa.ChunkedArray:
    """A role's column of texts, each of which has content."""
    name = column(source, role)
    values = source.table[name]
    if not (pa.types.is_string(values.type) or pa.types.is_large_string(values.type)):
        raise FedtriError(f'{source.where}: column "{name}" holds {values.type}, expected text; see columns.{role}')
    blank = [row for row, text in enumerate(values.to_pylist(), start=1) if not (text or "").strip()]
    if blank:
        raise FedtriError(
            f'{source.where}: column "{name}" is empty in {len(blank)} of {len(values)} rows, first in '
            f"example {blank[0]}, expected a text; fill these rows in or remove them"
        )
    return values.cast(pa.string())


def labels(source: Source, name: str) -> tuple[np.ndarray, tuple[str, ...]]:
    """A column's label ids (rows,) and the names of the labels."""
    values = source.table[name].to_pylist()
    for row, value in enumerate(values, start=1):
        if value is None or value == "" or value != value or not isinstance(value, Hashable):
            raise FedtriError(
                f'{source.where}: column "{name}" holds no label in example {row}, expected text or a '
                f"whole number, got {value!r}; fill the row in or remove it, or name another columns.label"
            )
    names = source.names.get(name) or {value: str(value) for value in in_order(set(values))}
    if source.classes:  # a site may hold some of them alone
        known = {text: value for value, text in names.items()}
        names = {known.get(text, text): text for text in source.classes}
    remedy = "correct the row, or network.labels at every end" if source.classes else "use a split that has labels"
    ids = {value: id for id, value in enumerate(names)}
    if unknown := set(values) - ids.keys():
        raise FedtriError(
            f'{source.where}: column "{name}" holds {min(map(repr, unknown))}, expected one of '
            f"{', '.join(map(repr, ids))}; {remedy}"
        )
    return np.array([ids[value] for value in values], dtype=np.int64), tuple(names.values())


def in_order(values: set[Any]) -> list[Any]:
    """Whole numbers by value, even where they are written as text; anything else in its own order."""
    try:
        return sorted(values, key=lambda value: (int(value), str(value)))
    except (ValueError, OverflowError):
        return sorted(values, key=str)


def made(
    source: Source,
    columns: Mapping[str, Any],
    used: Collection[str | None],
    label_names: tuple[str, ...] = (),
    *,
    classifies: bool = False,
) -> Pool:
    """The pool of columns by role, of which the source's limit is drawn; the columns `used` for them are left out.

    Raises FedtriError for a limit below 2, and where the labels are what is learned (`classifies`) and the table is no
    site's share, for fewer than two labels and for a label seen once.
    """
    further = [name for name in source.table.column_names if name not in {*columns, *used}]
    table = pa.table({**columns, **{name: source.table[name] for name in further}})
    if source.limit is not None:
        table = table.take(sample(table.num_rows, source.limit, source.seed))
    pool = Pool(source.name, datasets.Dataset(table), label_names)
    if classifies and not source.classes:
        _check_labels(source, pool)
    return pool


def made_by_domain(source: Source, columns: Mapping[str, Any]) -> Pool:
    """The pool of columns by role for a task that predicts no class; a "label", where there is one, is the domain."""
    used = {optional(source, role) for role in columns}
    if (label := optional(source, "label")) is None:
        return made(source, columns, used)
    ids, names = labels(source, label)
    return made(source, {**columns, "label": ids}, {*used, label}, names)


def sample(rows: int, limit: int, seed: int) -> np.ndarray:
    """At most `limit` row numbers, ascending."""
    if limit < 2:
        raise FedtriError(f"limit: expected at least 2 examples, got {limit}")
    chosen = np.random.default_rng(derive(seed, "limit")).permutation(rows)[:limit]
    return np.sort(chosen)


def _check_labels(source: Source, pool: Pool) -> None:
    """At least two labels, none of them seen once: such a one cannot be both trained and tested."""
    names, labels = pool.label_names, pool.labels
    assert labels is not None
    counts = np.bincount(labels, minlength=len(names))
    limit = "" if source.limit is None else f" within limit = {source.limit}"
    where = f'{source.where}: column "{column(source, "label")}"{limit}'
    if (counts > 0).sum() < 2:
        raise FedtriError(f"{where} holds one label, {names[labels[0]]!r}; expected at least two to tell apart")
    if once := [names[label] for label in np.flatnonzero(counts == 1)]:
        more = f" and {len(once) - 1} others" if len(once) > 1 else ""
        remedy = "add or remove such examples, or name another columns.label"
        raise FedtriError(
            f"{where} holds the label {once[0]!r}{more} once, expected at least twice, to train and to test; "
            + (remedy if source.limit is None else "raise limit")
        )
