"""The pool: one table of all examples, with checked columns, before the examples are dealt to clients.

A task says which roles it needs. The functions here find the column of a role, check it, and make the pool.
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
"""The roles that a column may have in a task, and the names that are looked for if [columns] gives none."""


@dataclass(frozen=True)
class Pool:
    """All examples of a federation before they are dealt to clients.

    `table` has a column for each role that the task uses, under the role's name. "label" is int64, an index into
    `label_names`. The other columns of the source keep their names; natural partitions use them.
    """

    name: str
    table: datasets.Dataset
    label_names: tuple[str, ...] = ()
    """The names of the classes (or of words' tags, or of domains); empty if there are none."""

    @property
    def labels(self) -> Int[np.ndarray, "rows"] | None:
        """The class of each example; None if examples have no class."""
        return np.asarray(self.table["label"][:]) if "label" in self.table.column_names else None


@dataclass(frozen=True)
class Source:
    """A table as it was found, and which of its columns has which role."""

    name: str
    where: str
    """The file, folder or hub name, for error messages."""
    table: pa.Table
    columns: Mapping[str, str] = field(default_factory=dict)
    """The column of each role whose column does not have the default name."""
    names: Mapping[str, Mapping[Any, str]] = field(default_factory=dict)
    """For a column: the name of each value, in the order of the ids. Other columns: the distinct values, sorted."""
    limit: int | None = None
    """The largest number of examples, drawn with `seed`; None: all."""
    seed: int = 0
    classes: tuple[str, ...] = ()
    """If the table is one site's part: all classes of the federation, in the order of their ids."""


def column(source: Source, role: str) -> str:
    """The column of a role. Raises FedtriError if there is none."""
    name = optional(source, role)
    if name is None:
        raise FedtriError(
            f'{source.where}: no column "{ROLES[role][0]}", found {", ".join(source.table.column_names)}; '
            f"name the right one with columns.{role}"
        )
    return name


def optional(source: Source, role: str) -> str | None:
    """The column of a role; None if there is none. Raises FedtriError if [columns] names one that is missing."""
    found = source.table.column_names
    if (name := source.columns.get(role)) is None:
        return next((name for name in ROLES[role] if name in found), None)
    if name not in found:
        raise FedtriError(
            f'{source.where}: no column "{name}", found {", ".join(found)}; name the right one with columns.{role}'
        )
    return name


def texts(source: Source, role: str) -> pa.ChunkedArray:
    """A role's column of texts. Raises FedtriError if it holds something else, or a text is empty."""
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
    """A column's label ids (rows,) and the names of the labels. Raises FedtriError for a row without a known label."""
    values = source.table[name].to_pylist()
    for row, value in enumerate(values, start=1):
        if value is None or value == "" or value != value or not isinstance(value, Hashable):
            raise FedtriError(
                f'{source.where}: column "{name}" holds no label in example {row}, expected text or a '
                f"whole number, got {value!r}; fill the row in or remove it, or name another columns.label"
            )
    names = source.names.get(name) or {value: str(value) for value in in_order(set(values))}
    if source.classes:  # a site may hold only some of them
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
    """The values, sorted: by value if all are whole numbers (also as text), else as text."""
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
    """The pool of these columns, and of all other columns of the source. At most `source.limit` examples are drawn.

    Args:
        source: The table.
        columns: The checked column of each role.
        used: The names of the source's columns that `columns` came from; they are left out.
        label_names: The names of the classes.
        classifies: Whether the labels are what is learned.

    Raises:
        FedtriError: For a limit below 2. If `classifies`, and the table is not one site's part: for fewer than two
            labels, or a label with only one example.
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
    """The pool for a task that predicts no class. If there is a column "label", it is the domain of an example."""
    used = {optional(source, role) for role in columns}
    if (label := optional(source, "label")) is None:
        return made(source, columns, used)
    ids, names = labels(source, label)
    return made(source, {**columns, "label": ids}, {*used, label}, names)


def sample(rows: int, limit: int, seed: int) -> np.ndarray:
    """At most `limit` row numbers, ascending, drawn with `seed`. Raises FedtriError for a limit below 2."""
    if limit < 2:
        raise FedtriError(f"limit: expected at least 2 examples, got {limit}")
    chosen = np.random.default_rng(derive(seed, "limit")).permutation(rows)[:limit]
    return np.sort(chosen)


def _check_labels(source: Source, pool: Pool) -> None:
    """Refuse fewer than two labels, and a label with one example: it cannot be both trained and tested."""
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
