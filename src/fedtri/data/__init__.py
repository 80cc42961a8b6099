"""Where examples come from, one file a source; partition.py deals them to clients."""

from collections.abc import Sequence
from pathlib import Path

from fedtri.data import ag_news, docstrings, glue, hub, tables
from fedtri.data.pool import Pool, Source, pool_of
from fedtri.errors import FedtriError

__all__ = ["Pool", "load_pool"]


def load_pool(
    data: str,
    *,
    text_columns: Sequence[str] = (),
    label_column: str | None = None,
    limit: int | None = None,
    seed: int = 0,
) -> Pool:
    """All examples that `data` names.

    Args:
        data: "docstrings" (the embedded source); a .csv, .tsv, .jsonl, .json or .parquet file; the folder of
            a GLUE task or of AG News, or one of its files; else a folder or hub name ("name" or
            "name:config") that `datasets.load_dataset` takes.
        text_columns: One or two columns; by default "text" or "sentence". With these or `label_column` given,
            GLUE and AG News are read as ordinary tables.
        label_column: By default "label". Ids follow the labels' sorted order, whole numbers by value.
        limit: At most so many examples, drawn at random with `seed`.

    Raises:
        FedtriError: Naming the file, key or column, what was expected and what was found.
    """
    return pool_of(source_of(data, tuple(text_columns), label_column), limit=limit, seed=seed)


def source_of(data: str, text_columns: tuple[str, ...], label_column: str | None) -> Source:
    """The table `data` names, before any check of its contents."""
    named = bool(text_columns or label_column)
    if data == "docstrings":
        if named:
            raise FedtriError('data "docstrings" has its own columns; leave out text_columns and label_column')
        return docstrings.load()
    path = Path(data).expanduser()
    if not named and (known := glue.find(path) or ag_news.find(path)):
        return known
    if path.is_file():
        return Source(path.stem, str(path), tables.read(path), text_columns, label_column)
    if not path.exists() and (path.suffix.lower() in tables.READERS or path.is_absolute() or data.startswith(".")):
        raise FedtriError(f'data "{data}": no such file or folder (looked for {path.absolute()}); check the path')
    return hub.load(str(path) if path.exists() else data, text_columns=text_columns, label_column=label_column)
