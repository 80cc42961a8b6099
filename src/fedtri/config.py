"""The configuration of a run: flat keys for what people type, named tables for what is rarer, one-line errors."""

import difflib
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from fedtri.errors import FedtriError

PositiveInt = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, lt=1)]


class Strict(BaseModel):
    """Unknown keys and wrong types are errors; nothing is coerced but int to float."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Optimizer(Strict):
    """[optimizer]: AdamW of the local steps; the schedule spans one round."""

    schedule: Literal["constant", "linear", "cosine", "constant_with_warmup"] = "constant"
    warmup: Annotated[int, Field(ge=0)] = 0
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    betas: Annotated[list[float], Field(min_length=2, max_length=2)] = [0.9, 0.999]
    clip: Annotated[float, Field(gt=0)] | Literal[False] = 1.0


class DataOptions(Strict):
    """[data_options]: at most `limit` examples of the pool, drawn with the run's seed."""

    limit: PositiveInt | None = None


class SplitOptions(Strict):
    """[split]: what share of each client's examples is for training, validation and test."""

    train: Annotated[float, Field(gt=0, lt=1)] = 0.7
    validation: Share = 0.1
    test: Annotated[float, Field(gt=0, lt=1)] = 0.2

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if abs(self.train + self.validation + self.test - 1) > 1e-6:
            raise ValueError("train + validation + test must be 1")
        return self


class EarlyStopping(Strict):
    """[early_stopping]: stop when the mean validation loss has not improved for `patience` rounds."""

    patience: PositiveInt | None = None


class Simulation(Strict):
    """[simulation]: how many clients share a pass (0: all), and how many padded tokens one micro-batch may have.

    1024 tokens keep a micro-batch's activations in a processor's cache; a GPU wants 16384 or more.
    """

    cohort: Annotated[int, Field(ge=0)] = 16
    token_budget: PositiveInt = 1024


class Wire(Strict):
    """[wire]: the number type on the wire, and the largest norm a client's tensor may have."""

    dtype: Literal["float32", "float16", "bfloat16", "float64"] = "float32"
    norm_bound: Annotated[float, Field(gt=0)] = 1e4


class Config(Strict):
    """A run. The defaults are the demo: MiniLM on docstrings, 8 clients whose label mixes differ."""

    model: str = "minilm"
    data: str = "docstrings"
    text_columns: list[str] = []
    label_column: str | None = None
    method: str = "ce_lora"
    clients: PositiveInt | None = 8
    partition: str = "dirichlet:0.3"
    fraction: Annotated[float, Field(gt=0, le=1)] = 1.0
    rounds: PositiveInt = 5
    steps: PositiveInt | None = None
    epochs: Annotated[float, Field(gt=0)] | None = None
    batch_size: PositiveInt = 16
    max_length: PositiveInt = 128
    learning_rate: Annotated[float, Field(gt=0)] = 2e-3
    rank: PositiveInt = 8
    lora_alpha: Annotated[float, Field(gt=0)] = 16.0
    targets: str | list[str] = "auto"
    head: Literal["default", "personal", "shared"] = "default"
    seed: Annotated[int, Field(ge=0)] = 0
    device: str = "auto"
    evaluate: bool = True
    out: str | None = None
    init_adapter: str | None = None
    method_options: dict[str, Any] = {}
    optimizer: Optimizer = Optimizer()
    data_options: DataOptions = DataOptions()
    split: SplitOptions = SplitOptions()
    early_stopping: EarlyStopping = EarlyStopping()
    simulation: Simulation = Simulation()
    wire: Wire = Wire()

    @model_validator(mode="before")
    @classmethod
    def _one_length(cls, values: dict[str, Any]) -> dict[str, Any]:
        if values.get("steps") is not None and values.get("epochs") is not None:
            raise ValueError("steps and epochs are both given; a round has one or the other")
        if values.get("epochs") is None and values.get("steps") is None:
            values = {**values, "steps": 10}
        return values


def load(path: str | Path | None, settings: Sequence[str] = (), **flags: object) -> Config:
    """A config from a TOML file (or the defaults), overridden by flags that are not None, then by `key=value` settings.

    Raises FedtriError naming the file, the key, what was expected and what was found.
    """
    values: dict[str, Any] = {}
    where = "settings" if path is None else str(path)
    if path is not None:
        try:
            values = tomllib.loads(Path(path).read_text())
        except OSError as error:
            raise FedtriError(f"{path}: cannot be read: {error.strerror}; expected a TOML configuration file") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise FedtriError(f"{path}: is not TOML: {error}") from None
    overrides = {key: value for key, value in flags.items() if value is not None}
    for setting in settings:
        key, value = parse_setting(setting)
        overrides[key] = value
    for key, value in overrides.items():
        _put(values, key, value)
    return validated(values, where)


def validated(values: Mapping[str, Any], where: str = "config") -> Config:
    """The config these values make. Raises FedtriError in one line."""
    try:
        return Config.model_validate(dict(values))
    except ValidationError as error:
        raise FedtriError(f"{where}: {_one_line(error)}") from None


def parse_setting(text: str) -> tuple[str, Any]:
    """`key=value` or `table.key=value`; the value as TOML or, failing that, as a string."""
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise FedtriError(f"--set {text!r}: expected key=value")
    try:
        return key.strip(), tomllib.loads(f"value = {value.strip()}")["value"]
    except tomllib.TOMLDecodeError:
        return key.strip(), value.strip()


def dumps(config: Config) -> str:
    """The complete configuration as TOML, defaults filled in; keys that are not set are left out."""
    return tomli_w.dumps(config.model_dump(exclude_none=True))


def _put(values: dict[str, Any], key: str, value: object) -> None:
    if {key, *values} >= {"steps", "epochs"}:
        values.pop("epochs" if key == "steps" else "steps")
    *tables, last = key.split(".")
    for table in tables:
        values = values.setdefault(table, {})
        if not isinstance(values, dict):
            raise FedtriError(f"--set {key}: {table} is a value, not a table")
    values[last] = value


def _one_line(error: ValidationError) -> str:
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"] if part in _all_keys() or isinstance(part, int))
    if first["type"] == "extra_forbidden":
        name = ".".join(map(str, first["loc"]))
        close = difflib.get_close_matches(str(first["loc"][-1]), _all_keys(), 1)
        return f"unknown key {name!r}" + (f"; did you mean {close[0]!r}?" if close else "; see `fedtri run --help`")
    message = first["msg"].removeprefix("Value error, ").replace("Input should be", "expected").lower()
    return f"{key}: {message}, got {first['input']!r}" if key else message


def _all_keys() -> list[str]:
    tables = (Optimizer, DataOptions, SplitOptions, EarlyStopping, Simulation, Wire)
    return [*Config.model_fields, *(name for table in tables for name in table.model_fields)]
