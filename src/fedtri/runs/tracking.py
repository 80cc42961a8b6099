"""Passing a run's numbers on to TensorBoard, MLflow, Weights & Biases or Trackio, round by round."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from fedtri.errors import FedtriError
from fedtri.metrics import SPREADS

Tell = Callable[[Path, Mapping[str, Any]], None]
Log = Callable[[int, Mapping[str, float]], None]
PROJECT = "fedtri"


@contextmanager
def tracker(name: str | None, config: Mapping[str, Any]) -> Iterator[Tell]:
    """A function `tell(folder, line)` to call after each round; it does nothing where `name` is None.

    Raises FedtriError for an unknown tracker, or one that is not installed, before anything runs.
    """
    if name is None:
        yield lambda folder, line: None
        return
    if name not in TRACKERS:
        raise FedtriError(f"--track: expected one of {', '.join(TRACKERS)}, got {name!r}")
    start, package = TRACKERS[name]
    try:
        module = import_module(package)
    except ImportError:
        raise FedtriError(f"--track: {name} is not installed; `pip install 'fedtri[{name}]'`") from None
    with ExitStack() as stack:
        logs: list[Log] = []

        def tell(folder: Path, line: Mapping[str, Any]) -> None:
            if not logs:  # the folder is known with the first round
                log, close = start(module, folder, config)
                stack.callback(close)
                logs.append(log)
            logs[0](line["round"], values(line))

        yield tell


def values(line: Mapping[str, Any]) -> dict[str, float]:
    """A line of rounds.jsonl as flat numbers: "accuracy/mean", "bytes/up", "seconds/train", …; no value per client."""
    found: dict[str, float] = {"loss": line["loss"]} if line.get("loss") is not None else {}
    for metric in SPREADS:
        spread = line.get(metric) or {}
        found |= {f"{metric}/{key}": spread[key] for key in ("mean", "worst", "best") if key in spread}
    for metric, spread in (line.get("metrics") or {}).items():
        found |= {f"{metric}/{key}": spread[key] for key in ("mean", "worst", "best")}
    found |= {f"bytes/{way}": sum(counts.values()) for way, counts in (line.get("bytes") or {}).items()}
    found |= {f"seconds/{phase}": spent for phase, spent in (line.get("seconds") or {}).items()}
    return found


def _tensorboard(module: Any, folder: Path, config: Mapping[str, Any]) -> tuple[Log, Callable[[], object]]:
    writer = module.SummaryWriter(str(folder / "tensorboard"))
    writer.add_text("config", "\n".join(f"    {key} = {value}" for key, value in config.items()))

    def log(round: int, values: Mapping[str, float]) -> None:
        for key, value in values.items():
            writer.add_scalar(key, value, round)
        writer.flush()

    return log, writer.close


def _mlflow(module: Any, folder: Path, config: Mapping[str, Any]) -> tuple[Log, Callable[[], object]]:
    module.set_experiment(PROJECT)
    module.start_run(run_name=folder.name)
    module.log_params({key: str(value)[:500] for key, value in config.items()})
    return lambda round, values: module.log_metrics(dict(values), step=round), module.end_run


def _wandb(module: Any, folder: Path, config: Mapping[str, Any]) -> tuple[Log, Callable[[], object]]:
    run = module.init(project=PROJECT, name=folder.name, dir=str(folder), config=dict(config))
    return lambda round, values: run.log(dict(values), step=round), run.finish


def _trackio(module: Any, folder: Path, config: Mapping[str, Any]) -> tuple[Log, Callable[[], object]]:
    module.init(project=PROJECT, name=folder.name, config=dict(config))
    return lambda round, values: module.log(dict(values), step=round), module.finish


TRACKERS = {
    "tensorboard": (_tensorboard, "torch.utils.tensorboard"),
    "mlflow": (_mlflow, "mlflow"),
    "wandb": (_wandb, "wandb"),
    "trackio": (_trackio, "trackio"),
}
