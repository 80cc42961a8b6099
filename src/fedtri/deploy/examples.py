"""A site's own examples: read, tokenised and split once, and kept on the site's disk until they change."""

import hashlib
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np

from fedtri import atomic
from fedtri.config import Config
from fedtri.data.partition import Split
from fedtri.errors import FedtriError
from fedtri.runs.spec import columns_of
from fedtri.storage.run_directory import LAYOUT
from fedtri.tasks import Examples, Recipe


@dataclass(frozen=True)
class Found:
    """A site's examples, the client's split of them, and the file that keeps the sketch of them."""

    examples: Examples
    split: Split
    sketch: Path


def load(config: Config, client: str, cache: Path, recipe: Recipe, processor: Any) -> Found:
    """The site's examples: from the cache, where that was made of the same data, model and settings."""
    name = digest(config, client)
    path, sketch = cache / f"{name}.npz", cache / f"{name}.{config.similarity.sketch_dims}.sketch"
    if recipe.kept is None:
        made = _made(config, recipe, processor)
        return Found(
            made,
            _split(config, client, len(made.lengths)),
            sketch,
        )
    if not path.exists():
        made = _made(config, recipe, processor)
        _write(path, {**flat(made, "examples."), **flat(_split(config, client, len(made.lengths)), "split.")})
    with np.load(path, allow_pickle=False) as file:
        arrays = {key: file[key] for key in file.files}
    return Found(
        whole(recipe.kept, arrays, "examples."),
        whole(Split, arrays, "split."),
        sketch,
    )


def digest(config: Config, client: str) -> str:
    """A name for the cache; it changes with the data, the model's files, and the settings that examples depend on."""
    said = {
        "layout": LAYOUT,
        "client": client,
        "files": [_state(config.data), _state(config.model)],
        "task": [config.task, config.task_options, config.columns.model_dump(), config.max_length],
        "split": [config.split.model_dump(), config.data_options.model_dump(), config.seed],
        "labels": config.network.labels,
    }
    return hashlib.blake2b(json.dumps(said).encode(), digest_size=12).hexdigest()


def flat(value: object, prefix: str) -> dict[str, np.ndarray]:
    """A dataclass of arrays, numbers and further such dataclasses as one table of arrays, without what is None."""
    table: dict[str, np.ndarray] = {}
    for part in (part for part in fields(value) if part.init):  # pyright: ignore[reportArgumentType]
        own = getattr(value, part.name)
        if is_dataclass(own):
            table |= flat(own, f"{prefix}{part.name}.")
        elif own is not None:
            table[prefix + part.name] = np.asarray(own)
    return table


def whole(kind: type[Any], table: Mapping[str, np.ndarray], prefix: str) -> Any:
    """The inverse of `flat`."""
    hints, values = get_type_hints(kind), {}
    for name in (part.name for part in fields(kind) if part.init):
        inner = next((t for t in (hints[name], *get_args(hints[name])) if is_dataclass(t)), None)
        own = table.get(prefix + name)
        if inner is not None:
            there = any(key.startswith(f"{prefix}{name}.") for key in table)
            values[name] = whole(inner, table, f"{prefix}{name}.") if there else None  # pyright: ignore[reportArgumentType]
        else:
            values[name] = own.item() if own is not None and own.ndim == 0 else own
    return kind(**values)


def _made(config: Config, recipe: Recipe, processor: Any) -> Examples:
    from fedtri.data import load_pool  # 1 s to import, and only the first call needs it

    pool = load_pool(
        config.data, recipe.pool, columns=columns_of(config), limit=config.data_options.limit, seed=config.seed,
        classes=config.network.labels,
    )  # fmt: skip
    if list(pool.label_names) != config.network.labels:
        raise FedtriError(
            f"network.labels: {config.data} holds the classes {', '.join(pool.label_names) or '(none)'}, expected "
            f"{', '.join(config.network.labels) or 'none'}; give all sites the same"
        )
    return recipe.examples(pool, processor, config.max_length)


def _split(config: Config, client: str, rows: int) -> Split:
    from fedtri.data.partition import split

    shares = (config.split.train, config.split.validation, config.split.test)
    return split("site", client, np.arange(rows), config.seed, shares)


def _write(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # pyright: ignore[reportArgumentType]
    atomic.write_bytes(path, buffer.getvalue())


def _state(name: str) -> list[object]:
    """The paths, sizes and times of change of a file or folder; of anything else, the name alone."""
    path = Path(name).expanduser()
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path] if path.is_file() else []
    return [name, [[str(p), (s := p.stat()).st_size, s.st_mtime_ns] for p in files]]
