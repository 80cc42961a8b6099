"""The configuration of a run: flat keys for what people type, named tables for what is rarer, one-line errors."""

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tomli_w
from pydantic import BaseModel, Field, ValidationError, model_validator

from fedtri.config.strict import STRICT, complaint
from fedtri.errors import FedtriError

PositiveInt = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, lt=1)]
ClientName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
"""What a client of a real network may be called: it is also a folder's name."""


class Strict(BaseModel):
    """Unknown keys and wrong types are errors; nothing is coerced but int to float."""

    model_config = STRICT


Letter = Literal["A", "C", "B", "S", "M", "a", "b", "P", "H"]
"""A factor that can learn, by its letter."""


class Optimizer(Strict):
    """[optimizer]: AdamW of the local steps; the schedule spans one round.

    [optimizer.learning_rates] gives a factor, by its letter, a learning rate in place of `learning_rate`: `C = 0.02`.
    """

    schedule: Literal["constant", "linear", "cosine", "constant_with_warmup"] = "constant"
    warmup: Annotated[int, Field(ge=0)] = 0
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    betas: Annotated[list[Share], Field(min_length=2, max_length=2)] = [0.9, 0.999]
    clip: Annotated[float, Field(gt=0)] | Literal[False] = 1.0
    learning_rates: dict[Letter, Annotated[float, Field(gt=0)]] = {}


class DataOptions(Strict):
    """[data_options]: at most `limit` examples of the pool, drawn with the run's seed."""

    limit: PositiveInt | None = None


class Columns(Strict):
    """[columns]: the column for each role of the task; for a role that is left out, the usual names are tried."""

    text: str | None = None
    text_pair: str | None = None
    label: str | None = None
    prompt: str | None = None
    response: str | None = None
    messages: str | None = None
    tokens: str | None = None
    tags: str | None = None
    image: str | None = None


class ModelOptions(Strict):
    """[model_options]: how the frozen weights are kept, and whether activations are computed again to save memory.

    "auto" is the checkpoint's own number type. Adapters are float32. 8bit and 4bit need bitsandbytes. With
    `mixed_precision` a float32 model's frozen linear layers multiply in bfloat16.
    """

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    quantization: Literal["none", "8bit", "4bit"] = "none"
    mixed_precision: Literal["none", "bfloat16"] = "none"
    gradient_checkpointing: bool = False


class SplitOptions(Strict):
    """[split]: what share of each client's examples is for training, validation and test."""

    train: Annotated[float, Field(gt=0, lt=1)] = 0.7
    validation: Share = 0.1
    test: Annotated[float, Field(gt=0, lt=1)] = 0.2

    @model_validator(mode="after")
    def _whole(self) -> "SplitOptions":
        if abs(self.train + self.validation + self.test - 1) > 1e-6:
            shares = (self.train, self.validation, self.test)
            raise ValueError(
                f"expected train + validation + test to be 1, got {' + '.join(f'{share:g}' for share in shares)}"
                f" = {sum(shares):g}; change the others too"
            )
        return self


class EarlyStopping(Strict):
    """[early_stopping]: stop when the mean validation loss has not improved for `patience` rounds."""

    patience: PositiveInt | None = None


class Simulation(Strict):
    """[simulation]: how the clients of one machine are trained.

    `executor` "fast" trains clients side by side and packs their texts into shared passes, "reference" trains one
    client at a time in plain PyTorch, "auto" is the fast one where it knows the model's architecture. `group` clients
    are trained together (0: all): they share the cores, and passes as far as the tokens allow. At 1 every client has
    the machine to itself, as on a network, and gets bit for bit the same result as there.

    `token_budget` is the most tokens in one pass: 1536 suits a processor, 16384 or more a GPU. Where the first layers
    have no adapter, what leaves them is kept: up to `prefix_budget` MB in memory, the rest in a file beside the run,
    nothing at 0; `prefix_dtype` "auto" is the model's own number type.

    With `transport = "flower-sim"` each client at work has `client_cpus` cores and `client_gpus` of a GPU to itself.
    """

    executor: Literal["auto", "fast", "reference"] = "auto"
    group: Annotated[int, Field(ge=0)] = 16
    token_budget: PositiveInt = 1536
    prefix_budget: Annotated[int, Field(ge=0)] = 1024
    prefix_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    client_cpus: PositiveInt = 1
    client_gpus: Annotated[float, Field(ge=0)] = 0.0


NumberTypeName = Literal["float32", "float16", "bfloat16", "float64", "int8", "int4", "sign"]


class Wire(Strict):
    """[wire]: the number types on the wire, and the largest norm a client's tensor may have.

    `up` is how clients write what they learned, `down` how the server writes what came of it, `basis` how a tensor is
    written that travels once: a basis that is never trained, and the first value of a tensor that neither end can
    derive from the seed. Where `up` or `down` is int8, int4 or sign, both send differences to what the other end
    has, and keep what rounding lost for the next message.
    """

    up: NumberTypeName = "float32"
    down: NumberTypeName = "float32"
    basis: NumberTypeName = "float32"
    norm_bound: Annotated[float, Field(gt=0)] = 1e4


class Similarity(Strict):
    """[similarity]: the sketch of its data that a client sends once, where the method wants one.

    Features are projected to `sketch_dims` random directions and sent in float16; 0: all of them, in float32.
    """

    sketch_dims: Annotated[int, Field(ge=0)] = 128


class ServerOptions(Strict):
    """[server]: how the server follows the direction in which the average of what is shared has moved."""

    optimizer: Literal["none", "fedavgm", "fedadam"] = "none"
    learning_rate: Annotated[float, Field(gt=0)] = 1.0
    betas: Annotated[list[Share], Field(min_length=2, max_length=2)] = [0.9, 0.99]


class Network(Strict):
    """[network]: who may take part on a real network, what its classes are called, and how long a round may take.

    `clients` are the names under which the server's operator registered the sites' keys, `labels` the classes in the
    order of their ids. A round starts when `minimum` clients are online, for which the server waits `patience` seconds.
    A phase of it takes at most `deadline` seconds; a client that fails is asked again up to `retries` times. A round
    that ends with fewer than `minimum` usable replies is tried `attempts` times in all before the run stops.
    """

    clients: list[ClientName] = []
    labels: list[str] = []
    minimum: PositiveInt = 2
    deadline: Annotated[float, Field(gt=0)] = 600.0
    patience: Annotated[float, Field(gt=0)] = 600.0
    retries: Annotated[int, Field(ge=0)] = 1
    attempts: PositiveInt = 3


class Config(Strict):
    """A run. A file may also have tables [methods.NAME], whose settings hold for that method alone: see `load`."""

    model: str = "minilm"
    data: str = "docstrings"
    task: str = "text_classification"
    method: str = "ce_lora"
    clients: PositiveInt | None = 8
    partition: str = "dirichlet:0.3"
    fraction: Annotated[float, Field(gt=0, le=1)] = 1.0
    rounds: PositiveInt = 5
    steps: PositiveInt | None = None
    epochs: Annotated[float, Field(gt=0)] | None = None
    batch_size: PositiveInt = 16
    max_length: Annotated[int, Field(ge=3)] = 128
    learning_rate: Annotated[float, Field(gt=0)] = 3e-3
    rank: PositiveInt | list[PositiveInt] | Annotated[str, Field(pattern=r"^uniform:[1-9]\d*,[1-9]\d*$")] = 8
    adapter: Literal["lora", "dora", "hira"] = "lora"
    basis: Literal["default", "kaiming", "orthonormal", "gradient", "weights"] = "default"
    basis_examples: PositiveInt = 64
    basis_factors: PositiveInt = 4
    lora_alpha: Annotated[float, Field(gt=0)] = 16.0
    targets: str | Annotated[list[str], Field(min_length=1)] = "auto"
    layers: Annotated[str, Field(pattern=r"^(all|last:[1-9]\d*)$")] = "all"
    head: Literal["default", "personal", "shared"] = "default"
    weights: Literal["default", "examples", "uniform"] = "default"
    head_start: Literal["initial", "fit"] = "initial"
    labels: Literal["shared", "own"] = "shared"
    seed: Annotated[int, Field(ge=0)] = 0
    device: str = "auto"
    evaluate: bool = True
    transport: Literal["local", "flower-sim"] = "local"
    out: str | None = None
    init_adapter: str | None = None
    columns: Columns = Columns()
    method_options: dict[str, Any] = {}
    task_options: dict[str, Any] = {}
    model_options: ModelOptions = ModelOptions()
    optimizer: Optimizer = Optimizer()
    data_options: DataOptions = DataOptions()
    split: SplitOptions = SplitOptions()
    early_stopping: EarlyStopping = EarlyStopping()
    simulation: Simulation = Simulation()
    wire: Wire = Wire()
    similarity: Similarity = Similarity()
    server: ServerOptions = ServerOptions()
    network: Network = Network()

    @model_validator(mode="before")
    @classmethod
    def _defaults(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Defaults that depend on another key: 15 steps where no epochs are given; a natural partition's clients."""
        if values.get("steps") is not None and values.get("epochs") is not None:
            raise ValueError("steps and epochs are both given, expected one of them; leave the other out")
        if values.get("epochs") is None and values.get("steps") is None:
            values = {**values, "steps": 15}
        if str(values.get("partition")).startswith("natural:"):
            values = {"clients": None, **values}
        return values


def load(path: str | Path | None = None, settings: Sequence[str] = (), **flags: object) -> Config:
    """The configuration in a TOML file (or the defaults), overridden by flags that are not None, then by settings.

    What the table [methods.NAME] says holds where the run's method is NAME, over the rest of the file; flags and
    settings win over both.

    Raises FedtriError naming the file, the key, what was expected and what was found.
    """
    values = {} if path is None else read(path)
    where = "config" if path is None else str(path)
    given = {f"--{key}": (key, value) for key, value in flags.items() if value is not None}
    given |= {f"--set {key}": (key, value) for key, value in map(parse_setting, settings)}
    asked = dict(given.values())
    for origin, (key, value) in given.items():
        if key.startswith("methods."):
            _put(values, key, value, origin)
    given = {origin: one for origin, one in given.items() if not one[0].startswith("methods.")}
    values = for_method(values, str(asked.get("method", values.get("method", Config().method))), where)
    if {"steps", "epochs"} <= set(asked):
        raise FedtriError("--set steps, --set epochs: both are given, expected one of them; leave the other out")
    # what is asked for replaces what the file says of the same matter
    replaced = {"steps": "epochs", "epochs": "steps"}
    if str(asked.get("partition")).startswith("natural:") and "clients" not in asked:
        replaced["partition"] = "clients"
    for key in replaced.keys() & asked.keys():
        values.pop(replaced[key], None)
    for origin, (key, value) in given.items():
        _put(values, key, value, origin)
    return validated(values, where, {key: origin for origin, (key, _) in given.items()})


def for_method(values: Mapping[str, Any], method: str, where: str) -> dict[str, Any]:
    """A file's values with those of its table [methods.METHOD] over them, and without the tables of other methods.

    Raises FedtriError where one of these tables, whosever it is, does not fit into a configuration.
    """
    tables, values = values.get("methods", {}), {key: value for key, value in values.items() if key != "methods"}
    if not isinstance(tables, dict) or not all(isinstance(own, dict) for own in tables.values()):
        raise FedtriError(f"{where}: methods: expected a table for each method, such as [methods.fed_sb]")
    for name, own in tables.items():
        if fixed := own.keys() & {"method", "methods", "seed", "out", "clients", "partition", "data"}:
            raise FedtriError(f"{where}: methods.{name}.{min(fixed)}: is the same for all methods; leave it out")
        validated(_over(values, own), f"{where} [methods.{name}]")
    return _over(values, tables.get(method.rpartition(":")[2], {}))


def _over(values: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """`own` over `values`, tables key by key; steps take the place of epochs, and the other way round."""
    kept = dict(values)
    for key, other in (("steps", "epochs"), ("epochs", "steps")):
        if key in own:
            kept.pop(other, None)
    for key, value in own.items():
        both = isinstance(value, dict) and isinstance(kept.get(key), dict)
        kept[key] = _over(kept[key], value) if both else value
    return kept


def read(path: str | Path) -> dict[str, Any]:
    """The tables of a TOML file, as they stand. Raises FedtriError where there are none."""
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise FedtriError(f"{path}: cannot be read: {error.strerror}; expected a TOML configuration file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise FedtriError(f"{path}: is not TOML: {error}; correct it, or give a data file with --data") from None


def validated(values: Mapping[str, Any], where: str = "config", origins: Mapping[str, str] | None = None) -> Config:
    """The config these values make; `origins` names the option that gave a key, where it is not from `where`.

    Raises FedtriError in one line.
    """
    try:
        return Config.model_validate(dict(values))
    except ValidationError as error:
        key, what = complaint(Config, error)
    origins = origins or {}
    origin = next((origins[k] for k in origins if key and (k == key or k.startswith(f"{key}."))), None)
    raise FedtriError(f"{origin or ': '.join(filter(None, (where, key)))}: {what}")


def parse_setting(text: str) -> tuple[str, Any]:
    """The key and value of `key=value` or `table.key=value`. A value that is not TOML is a string."""
    key, equals, value = (part.strip() for part in text.partition("="))
    if not equals or not all(key.split(".")):
        raise FedtriError(f"--set {text}: expected key=value, such as rounds=3")
    try:
        return key, tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return key, value


def dumps(config: Config) -> str:
    """The complete configuration as TOML, defaults filled in; keys that are not set are left out."""
    return tomli_w.dumps(config.model_dump(exclude_none=True))


def _put(values: dict[str, Any], key: str, value: object, origin: str) -> None:
    *tables, last = key.split(".")
    for table in tables:
        values = values.setdefault(table, {})
        if not isinstance(values, dict):
            raise FedtriError(f"{origin}: {table} is a value, not a table; expected --set {table}=VALUE")
    values[last] = value
