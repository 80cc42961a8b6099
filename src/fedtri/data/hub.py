"""Whatever `datasets.load_dataset` takes: a local folder, or the "name" or "name:config" of a data set on the hub.

The split "train" is read, or the first one if there is no "train".
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pyarrow as pa
from datasets.exceptions import DatasetsError

from fedtri.data.pool import Source
from fedtri.errors import FedtriError


def load(data: str, columns: Mapping[str, str]) -> Source:
    """The data set. It is downloaded unless it is local or cached. ClassLabel columns keep the names of their classes.

    Raises FedtriError if `datasets` cannot read it.
    """
    name, _, config = (data, "", "") if Path(data).exists() else data.partition(":")
    try:
        with quiet():
            splits = datasets.load_dataset(name, config or None)
    except (DatasetsError, OSError, ValueError, RuntimeError) as error:
        kinds = 'neither "docstrings", "digits" nor a file' + ("" if Path(data).exists() else " or folder")
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise FedtriError(f'data "{data}": {kinds}, and datasets.load_dataset cannot read it: {reason}') from error
    split = splits["train" if "train" in splits else min(splits)]
    table = split.with_format("arrow")[:]
    return Source(Path(name).name, data, table, columns, class_names(split.features))


def class_names(features: datasets.Features) -> dict[str, dict[Any, str]]:
    """For each column of ClassLabel or of lists of ClassLabel: the name of each id, in the order of the ids."""
    inner = {column: getattr(feature, "feature", feature) for column, feature in features.items()}
    return {
        column: dict(enumerate(feature.names))
        for column, feature in inner.items() if isinstance(feature, datasets.ClassLabel)
    }  # fmt: skip


def described(schema: pa.Schema) -> datasets.Features:
    """The column types that `datasets` wrote into a Parquet file; empty if another tool wrote the file."""
    said = b"huggingface" in (schema.metadata or {})
    return datasets.Features.from_arrow_schema(schema) if said else datasets.Features()


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the progress bars and notes of `datasets` and the hub: they would disturb the run's own display."""
    bars = not datasets.are_progress_bars_disabled()
    levels = {library: library.get_verbosity() for library in (datasets.logging, huggingface_hub.logging)}
    datasets.disable_progress_bars()
    for library in levels:
        library.set_verbosity_error()
    try:
        yield
    finally:
        for library, level in levels.items():
            library.set_verbosity(level)
        if bars:
            datasets.enable_progress_bars()
