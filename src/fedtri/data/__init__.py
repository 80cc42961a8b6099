"""Reads examples: one file for each source. partition.py deals them to clients."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from fedtri.data import ag_news, digits, docstrings, glue, hub, tables
from fedtri.data.pool import Pool, Source
from fedtri.errors import FedtriError

__all__ = ["Pool", "Source", "load_pool"]

EMBEDDED = {"docstrings": docstrings.load, "digits": digits.load}


def load_pool(
    data: str,
    made: Callable[[Source], Pool],
    *,
    columns: Mapping[str, str] | None = None,
    limit: int | None = None,
    seed: int = 0,
    classes: Sequence[str] = (),
) -> Pool:
    """All examples that `data` names, as the pool that a task makes of them.

    Args:
        data: "docstrings" or "digits" (the embedded sources); a .csv, .tsv, .jsonl, .json or .parquet file; the
            folder of a GLUE task or of AG News, or one of its files; else a folder or hub name ("name" or
            "name:config") that `datasets.load_dataset` takes.
        made: The task's function from a source to a pool.
        columns: The column of each role; `pool.ROLES` has the defaults. If any is given, GLUE and AG News are read as
            ordinary tables. Label ids follow the sorted labels (whole numbers by value).
        limit: The largest number of examples, drawn at random with `seed`.
        seed: The run's seed.
        classes: If the data are only one site's part: all classes of the federation, in the order of their ids.

    Raises:
        FedtriError: In one line: the file, key or column, what was expected and what was found.
    """
    source = source_of(data, columns or {})
    found = source.table.column_names
    if source.table.num_rows == 0:
        raise FedtriError(f"{source.where}: holds no examples, expected one a row; check the file")
    if twice := [name for name in found if found.count(name) > 1]:
        raise FedtriError(f'{source.where}: column "{twice[0]}" occurs more than once; rename one of them')
    return made(replace(source, limit=limit, seed=seed, classes=tuple(classes)))


def source_of(data: str, columns: Mapping[str, str]) -> Source:
    """The table that `data` names. Its contents are not checked yet."""
    if data in EMBEDDED:
        if columns:
            raise FedtriError(f'data "{data}" has its own columns; leave out [columns]')
        return EMBEDDED[data]()
    path = Path(data).expanduser()
    if not columns and (known := glue.find(path) or ag_news.find(path)):
        return known
    if path.is_file():
        table = tables.read(path)
        return Source(path.stem, str(path), table, columns, hub.class_names(hub.described(table.schema)))
    if not path.exists() and (path.suffix.lower() in tables.READERS or path.is_absolute() or data.startswith(".")):
        raise FedtriError(f'data "{data}": no such file or folder (looked for {path.absolute()}); check the path')
    return hub.load(str(path) if path.exists() else data, columns)
