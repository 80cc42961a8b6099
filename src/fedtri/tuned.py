"""A finished run's models: opened again, exported, and asked."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from fedtri import checkpoint, rundir
from fedtri import config as configuration
from fedtri import export as peft_format
from fedtri.config import Config
from fedtri.errors import FedtriError
from fedtri.federation import choose_method, load_cohort, start
from fedtri.models import locate
from fedtri.store import ClientStore
from fedtri.tasks import text_classification as text
from fedtri.types import Factors


@dataclass(frozen=True)
class Tuned:
    """One client's factors of a run, and what everyone started from."""

    config: Config
    labels: tuple[str, ...]
    factors: Factors


@dataclass(frozen=True)
class Answer:
    """A text, and the (label, probability) of the tuned and of the untuned model."""

    text: str
    tuned: tuple[str, float]
    untuned: tuple[str, float]


def open_client(folder: Path, client: str) -> Tuned:
    """A client's factors as of the last whole checkpoint. Raises FedtriError for an unknown client or no checkpoint."""
    config = configuration.load(rundir.require(folder) / "config.toml")
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
    return Tuned(config, tuple(rundir.read_labels(folder)), factors)


def export(folder: Path, client: str, to: Path, *, merge: bool = False) -> None:
    """Write the client's PEFT adapter, or with `merge` the whole plain model and its tokenizer, to a new folder."""
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise FedtriError(f"--to: {to} exists already, expected an empty or new folder; choose another")
    tuned = open_client(folder, client)
    alpha = tuned.config.lora_alpha
    rank = rank_of(tuned.factors)
    cohort, _, _ = load_cohort(tuned.config, tuned.labels, 1)
    if not merge:
        peft_format.write_peft(to, tuned.factors, cohort, alpha=alpha, base_model=locate(tuned.config.model))
        return
    model, tokenizer, _ = text.load(tuned.config.model, tuned.labels)
    merged = peft_format.merge(model, tuned.factors, cohort.layout, alpha / rank, tuned.config.adapter)
    part = to.with_name(f".{to.name}.part")
    part.mkdir(parents=True, exist_ok=True)
    merged.save_pretrained(part)  # pyright: ignore[reportCallIssue]
    tokenizer.save_pretrained(part)
    part.replace(to)


def predict(folder: Path, client: str, texts: Sequence[str]) -> list[Answer]:
    """What the client's tuned model says of each text, and what the model it started from says."""
    if blank := [place for place, t in enumerate(texts, start=1) if not t.strip()]:
        raise FedtriError(f"text {blank[0]} is empty, expected something to classify")
    tuned = open_client(folder, client)
    config = tuned.config
    rank = rank_of(tuned.factors)
    cohort, tokenizer, head = load_cohort(config, tuned.labels, 1)
    untuned = start(config, cohort, head, choose_method(config).basis, rank)
    task = text.TextClassification(len(tuned.labels))
    examples = text.tokenize(tokenizer, list(texts), None, torch.zeros(len(texts)).long().numpy(), config.max_length)
    device = next(cohort.model.parameters()).device
    batch = {name: value.to(device) for name, value in examples.batch(torch.arange(len(texts)).numpy()).items()}
    said: list[list[tuple[str, float]]] = []
    for factors in (tuned.factors, untuned):
        cohort.write(0, factors, rank, config.lora_alpha)
        cohort.route([0] * len(texts))
        with torch.inference_mode():
            probabilities = task.logits(cohort.model, batch).softmax(-1).cpu()
        said.append([(tuned.labels[int(row.argmax())], float(row.max())) for row in probabilities])
    return [Answer(t, *pair) for t, *pair in zip(texts, *said, strict=True)]


def rank_of(factors: Factors) -> int:
    """The rank of a client's adapter; 1 where it has none."""
    return next((value.shape[0] for key, value in factors.items() if key.factor == "A"), 1)


def _some(names: Sequence[str], most: int = 12) -> str:
    return ", ".join(names[:most]) + (f" … ({len(names)} in all)" if len(names) > most else "")
