"""A site's own examples: read and tokenised once, split by the site's seed, kept on its disk until they change."""

import hashlib
import io
import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from fedtri.config import Config
from fedtri.errors import FedtriError
from fedtri.store import write_atomic
from fedtri.tasks import text_classification as text
from fedtri.types import Split


@dataclass(frozen=True)
class Found:
    """Tokenised examples, the client's split of them, and where the sketch of them is (to be) kept."""

    examples: text.TextExamples
    split: Split
    sketch: Path


def load(config: Config, client: str, cache: Path, tokenizer: PreTrainedTokenizerBase) -> Found:
    """The site's examples, from the cache where data, model and settings are those that it was made of."""
    name = _digest(config, client)
    path = cache / f"{name}.npz"
    if not path.exists():
        _make(config, client, path, tokenizer)
    with np.load(path, allow_pickle=False) as file:
        parts = {key: file[key] for key in file.files}
    found = text.TextExamples(
        tokens=parts["tokens"], types=parts.get("types"), offsets=parts["offsets"], labels=parts["labels"],
        pad=int(parts["pad"]),
    )  # fmt: skip
    split = Split(parts["train"], parts["validation"], parts["test"])
    return Found(found, split, cache / f"{name}.sketch")


def _make(config: Config, client: str, path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    from fedtri.data.partition import split  # 1 s to import, and only the first call needs it

    texts, pairs, labels = read(config)
    found = text.tokenize(tokenizer, texts, pairs, labels, config.max_length)
    shares = (config.split.train, config.split.validation, config.split.test)
    own = split("site", client, np.arange(len(labels)), config.seed, shares)
    arrays = {"tokens": found.tokens, "offsets": found.offsets, "labels": found.labels, "pad": np.asarray(found.pad)}
    if found.types is not None:
        arrays["types"] = found.types
    buffer = io.BytesIO()
    np.savez(buffer, train=own.train, validation=own.validation, test=own.test, **arrays)  # pyright: ignore[reportArgumentType]
    write_atomic(path, buffer.getvalue())


def read(config: Config) -> tuple[list[str], list[str] | None, np.ndarray]:
    """Texts, second texts where the task is on pairs, and label ids by `network.labels`, of the site's own data.

    Raises FedtriError naming file, column and what was expected. A site may lack some of the classes.
    """
    from fedtri.data import source_of
    from fedtri.data.pool import columns_of, labels_of, texts_of

    source = source_of(config.data, tuple(config.text_columns), config.label_column)
    if source.table.num_rows == 0:
        raise FedtriError(f"{source.where}: holds no examples, expected one a row; check the file")
    columns, label = columns_of(source)
    known = source.label_names or {value: str(value) for value in source.table[label].to_pylist()}
    values = {name: value for value, name in known.items()}
    source = replace(source, label_names={values.get(name, name): name for name in config.network.labels})
    ids, _ = labels_of(source, label)
    texts, *pairs = (texts_of(source, column).to_pylist() for column in columns)
    return texts, pairs[0] if pairs else None, ids


def _digest(config: Config, client: str) -> str:
    """A name that changes with the data, the model's files and what the examples and the sketch are made with."""
    said = {
        "client": client,
        "files": [_state(config.data), _state(config.model)],
        "settings": [config.text_columns, config.label_column, config.max_length, config.seed],
        "split": config.split.model_dump(),
        "labels": config.network.labels,
    }
    return hashlib.blake2b(json.dumps(said).encode(), digest_size=12).hexdigest()


def _state(name: str) -> list[object]:
    """A file's or folder's path, sizes and times of change; of anything else the name alone."""
    path = Path(name).expanduser()
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path] if path.is_file() else []
    return [name, [[str(p), (s := p.stat()).st_size, s.st_mtime_ns] for p in files]]
