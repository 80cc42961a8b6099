"""The models of a finished run: exported, scored again, and asked."""

import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from fedtri import atomic, messages
from fedtri import config as configuration
from fedtri.adapters.layout import Factors
from fedtri.adapters.model import load, of_classes
from fedtri.config import Config
from fedtri.errors import FedtriError
from fedtri.messages import POOLED, Request
from fedtri.models import peft as peft_format
from fedtri.models.loading import Weights, locate
from fedtri.runs import harness, vllm
from fedtri.runs.opening import Machine, initial, open_model
from fedtri.runs.simulation import build
from fedtri.runs.spec import Spec, spec_of
from fedtri.storage import checkpoint, run_directory
from fedtri.storage.client_store import ClientStore, owner


@dataclass(frozen=True)
class Tuned:
    """One client of a finished run: the run's Spec, and the client's own tensors."""

    spec: Spec
    machine: Machine
    factors: Factors
    own: tuple[str, ...] | None = None
    """The classes of the client's own head; None: all labels."""

    @property
    def rank(self) -> int:
        """The rank of the client's adapter; 1 where it has none."""
        return next((value.shape[0] for key, value in self.factors.items() if key.factor == "A"), 1)

    @property
    def classes(self) -> np.ndarray | None:
        """The ids of the client's own classes."""
        return None if self.own is None else np.array([self.spec.labels.index(name) for name in self.own])


@dataclass(frozen=True)
class Answer:
    """An input, and what the tuned and the untuned model answer."""

    text: str
    tuned: str
    untuned: str


def open_run(folder: Path) -> tuple[Config, checkpoint.Checkpoint]:
    """A run's configuration for this machine, and its last whole checkpoint. Raises FedtriError where there is none."""
    config = configuration.load(run_directory.require(folder) / "config.toml")
    found = checkpoint.load(folder / "checkpoints", folder / "clients")
    if found is None:
        raise FedtriError(f"{folder}: no round is finished yet; run `fedtri resume {folder}` first")
    return config.model_copy(update={"device": "auto"}), found  # the run may be from another machine


def open_client(folder: Path, client: str) -> Tuned:
    """A client of a run as of its last whole checkpoint. Raises FedtriError for an unknown client or no checkpoint."""
    config, found = open_run(folder)
    clients = sorted({owner(name) for name in found.clients} - {POOLED})
    _require(folder, client, clients)
    factors = ClientStore(folder / "clients", found.clients).load(client)
    assert factors is not None
    own = run_directory.read_own_labels(folder, client)
    spec = spec_of(config, run_directory.read_clients(folder), run_directory.read_labels(folder))
    return Tuned(spec, Machine.of(config), factors, None if own is None else tuple(own))


def export(folder: Path, client: str, to: Path, *, merge: bool = False, engine: str | None = None) -> str | None:
    """Write the client's PEFT adapter, or with `merge` the whole plain model and its tokenizer, to a new folder.

    For the serving engine "vllm" returns the command that serves it. Raises FedtriError, and leaves nothing behind,
    where that engine would not take it.
    """
    if engine not in (None, "vllm"):
        raise FedtriError(f"--for: expected vllm, got {engine!r}")
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise FedtriError(f"--to: {to} exists already, expected an empty or new folder; choose another")
    tuned = open_client(folder, client)
    spec, model = tuned.spec, tuned.machine.model
    if not merge:
        adapted = open_model(spec, tuned.machine).adapted
        peft_format.write_peft(
            to, tuned.factors, adapted, alpha=spec.scales.alpha, base_model=locate(model),
            task_type=spec.recipe.peft_type, labels=tuned.own,
        )  # fmt: skip
        return _served(to) if engine else None
    if engine and spec.recipe.peft_type != "CAUSAL_LM":
        raise FedtriError(
            f"--for vllm: vLLM serves causal language models, this is {spec.recipe.name}; leave --for out"
        )
    plain = spec.recipe.load(model, tuned.own or spec.labels, Weights(spec.model_options.dtype))
    scale = spec.scales.alpha / tuned.rank
    merged = peft_format.merge(plain.model, tuned.factors, spec.layout, scale, spec.kind)
    with atomic.folder(to) as part:
        merged.save_pretrained(part)  # pyright: ignore[reportCallIssue]
        plain.processor.save_pretrained(part)
    return f"vllm serve {to}" if engine else None


def _served(folder: Path) -> str:
    try:
        return vllm.check_vllm(folder)
    except FedtriError:
        shutil.rmtree(folder)
        raise


def evaluate(folder: Path, client: str | None = None) -> dict[str, dict[str, float]]:
    """Score the final model of every client (or of one) on its test examples again, from the run's own data.

    Raises FedtriError for an unknown client, and where no round is finished.
    """
    config, found = open_run(folder)
    built = build(config.model_copy(update={"evaluate": True}), ClientStore(folder / "clients", found.clients))
    known = built.spec.clients
    if client is not None:
        _require(folder, client, known)
    asked = [Request("evaluate", found.state.round, name, {}) for name in ([client] if client else known)]
    answers = [one for one in built.transport.exchange(asked) if isinstance(one, messages.Answer)]
    return {answer.reply.client: dict(answer.reply.metrics) for answer in answers}


def evaluate_elsewhere(
    folder: Path, client: str, tasks: Sequence[str], *, limit: int | None = None, include: Path | None = None
) -> harness.Scores:
    """Score a client's whole model on tasks of lm-evaluation-harness.

    Raises FedtriError where the run's model is no language model, and as `harness.evaluate` does.
    """
    task = open_client(folder, client).spec.recipe
    if task.peft_type != "CAUSAL_LM":
        raise FedtriError(f"--tasks: the harness asks causal language models, this run is {task.name}")
    with tempfile.TemporaryDirectory() as place:
        export(folder, client, Path(place) / "model", merge=True)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        return harness.evaluate(Path(place) / "model", tasks, limit=limit, include=include, device=device)


def predict(folder: Path, client: str, inputs: Sequence[str]) -> list[Answer]:
    """What a client's tuned model answers to each input, and what the model that it started from answers.

    Raises FedtriError for an empty input, and for a task that answers nothing.
    """
    if blank := [place for place, t in enumerate(inputs, start=1) if not t.strip()]:
        raise FedtriError(f"text {blank[0]} is empty, expected something to answer")
    tuned = open_client(folder, client)
    spec, recipe = tuned.spec, tuned.spec.recipe
    if recipe.answers is None:
        raise FedtriError(f"{folder}: task {recipe.name} has no answers to show; use fedtri export")
    opened = open_model(spec, tuned.machine)
    untuned = of_classes(spec.layout, initial(spec, opened, tuned.rank), tuned.classes)
    said = []
    for factors in (tuned.factors, untuned):
        load(opened.adapted, factors, rank=tuned.rank, alpha=spec.scales.alpha, classes=tuned.classes)
        said.append(recipe.answers(opened.adapted.model, opened.processor, spec.labels, inputs, spec.max_length))
    return [Answer(t, *pair) for t, *pair in zip(inputs, *said, strict=True)]


def _require(folder: Path, client: str, known: Sequence[str]) -> None:
    if client not in known:
        raise FedtriError(f"--client: {folder} has no client {client!r}, expected one of {_some(known)}")


def _some(names: Sequence[str], most: int = 12) -> str:
    return ", ".join(names[:most]) + (f" … ({len(names)} in all)" if len(names) > most else "")
