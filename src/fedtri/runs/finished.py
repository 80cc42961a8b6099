"""A finished run's models: opened again, exported, scored, and asked."""

import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from fedtri import config as configuration
from fedtri.adapters.layout import Factors
from fedtri.adapters.model import load, of_classes
from fedtri.config import Config
from fedtri.errors import FedtriError
from fedtri.messages import Request
from fedtri.models import peft as peft_format
from fedtri.models.loading import Weights, locate
from fedtri.runs import harness, vllm
from fedtri.runs.simulation import build, choose_method, choose_task, load_model, start
from fedtri.storage import checkpoint, run_directory
from fedtri.storage.client_store import ClientStore


@dataclass(frozen=True)
class Tuned:
    """One client's factors of a run, and what everyone started from."""

    config: Config
    labels: tuple[str, ...]
    factors: Factors
    own: tuple[str, ...] | None = None
    """The classes of the client's own head; None: all labels."""

    @property
    def classes(self) -> np.ndarray | None:
        """The ids of the client's own classes."""
        return None if self.own is None else np.array([self.labels.index(name) for name in self.own])


@dataclass(frozen=True)
class Answer:
    """An input, and what the tuned and the untuned model answer."""

    text: str
    tuned: str
    untuned: str


def open_client(folder: Path, client: str) -> Tuned:
    """A client's factors as of the last whole checkpoint. Raises FedtriError for an unknown client or no checkpoint."""
    config = configuration.load(run_directory.require(folder) / "config.toml")
    config = config.model_copy(update={"device": "auto"})  # the run may be from another machine
    found = checkpoint.load(folder / "checkpoints", folder / "clients")
    if found is None:
        raise FedtriError(f"{folder}: no round is finished yet; run `fedtri resume {folder}` first")
    if client not in found.clients:
        raise FedtriError(
            f"--client: {folder} has no client {client!r}, expected one of {_some(sorted(found.clients))}"
        )
    factors = ClientStore(folder / "clients", found.clients).load(client)
    assert factors is not None
    own = run_directory.read_own_labels(folder, client)
    return Tuned(config, tuple(run_directory.read_labels(folder)), factors, None if own is None else tuple(own))


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
    alpha = tuned.config.lora_alpha
    rank = rank_of(tuned.factors)
    adapted, _, _ = load_model(tuned.config, tuned.labels)
    recipe = choose_task(tuned.config)
    if not merge:
        peft_format.write_peft(
            to, tuned.factors, adapted, alpha=alpha, base_model=locate(tuned.config.model), task_type=recipe.peft_type,
            labels=tuned.own,
        )  # fmt: skip
        return _served(to) if engine else None
    if engine and recipe.peft_type != "CAUSAL_LM":
        raise FedtriError(f"--for vllm: vLLM serves causal language models, this is {recipe.name}; leave --for out")
    plain = recipe.load(tuned.config.model, tuned.own or tuned.labels, Weights(tuned.config.model_options.dtype))
    merged = peft_format.merge(plain.model, tuned.factors, adapted.layout, alpha / rank, tuned.config.adapter)
    part = to.with_name(f".{to.name}.part")
    part.mkdir(parents=True, exist_ok=True)
    merged.save_pretrained(part)  # pyright: ignore[reportCallIssue]
    plain.processor.save_pretrained(part)
    part.replace(to)
    return f"vllm serve {to}" if engine else None


def _served(folder: Path) -> str:
    try:
        return vllm.check_vllm(folder)
    except FedtriError:
        shutil.rmtree(folder)
        raise


def evaluate(folder: Path, client: str | None = None) -> dict[str, dict[str, float]]:
    """Each client's test metrics (or one client's) with what it ended with, computed again from the run's own data.

    Raises FedtriError for an unknown client, and where no round is finished.
    """
    config = configuration.load(run_directory.require(folder) / "config.toml").model_copy(
        update={"device": "auto", "evaluate": True}
    )
    found = checkpoint.load(folder / "checkpoints", folder / "clients")
    if found is None:
        raise FedtriError(f"{folder}: no round is finished yet; run `fedtri resume {folder}` first")
    built = build(config, ClientStore(folder / "clients", found.clients))
    known = built.transport.clients()
    if client is not None and client not in known:
        raise FedtriError(f"--client: {folder} has no client {client!r}, expected one of {_some(known)}")
    asked = [Request("evaluate", found.state.round, name, {}) for name in ([client] if client else known)]
    answers = built.transport.exchange(asked)
    return {answer.reply.client: dict(answer.reply.metrics) for answer in answers}


def evaluate_elsewhere(
    folder: Path, client: str, tasks: Sequence[str], *, limit: int | None = None, include: Path | None = None
) -> harness.Scores:
    """What lm-evaluation-harness finds of a client's whole model. Raises FedtriError for a task that is no language
    model's, and as `harness.evaluate` does."""
    config = open_client(folder, client).config
    if config.task != "causal_lm":
        raise FedtriError(f"--tasks: the harness asks causal language models, this run is {config.task}")
    with tempfile.TemporaryDirectory() as place:
        export(folder, client, Path(place) / "model", merge=True)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        return harness.evaluate(Path(place) / "model", tasks, limit=limit, include=include, device=device)


def predict(folder: Path, client: str, inputs: Sequence[str]) -> list[Answer]:
    """What the client's tuned model says of each input, and what the model it started from says.

    Raises FedtriError for an empty input, and for a task that answers nothing.
    """
    if blank := [place for place, t in enumerate(inputs, start=1) if not t.strip()]:
        raise FedtriError(f"text {blank[0]} is empty, expected something to answer")
    tuned = open_client(folder, client)
    config, recipe = tuned.config, choose_task(tuned.config)
    if recipe.answers is None:
        raise FedtriError(f"{folder}: task {recipe.name} has no answers to show; use fedtri export")
    rank = rank_of(tuned.factors)
    adapted, processor, head = load_model(config, tuned.labels)
    first = start(config, adapted, head, choose_method(config).adapter.basis, rank)
    untuned = of_classes(adapted.layout, first, tuned.classes)
    said = []
    for factors in (tuned.factors, untuned):
        load(adapted, factors, rank=rank, alpha=config.lora_alpha, classes=tuned.classes)
        said.append(recipe.answers(adapted.model, processor, tuned.labels, inputs, config.max_length))
    return [Answer(t, *pair) for t, *pair in zip(inputs, *said, strict=True)]


def rank_of(factors: Factors) -> int:
    """The rank of a client's adapter; 1 where it has none."""
    return next((value.shape[0] for key, value in factors.items() if key.factor == "A"), 1)


def _some(names: Sequence[str], most: int = 12) -> str:
    return ", ".join(names[:most]) + (f" … ({len(names)} in all)" if len(names) > most else "")
