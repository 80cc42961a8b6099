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
from fedtri.federation import load_cohort, start
from fedtri.methods import build
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
    found = checkpoint.load(folder / "checkpoints", folder / "clients")
    if found is None:
        raise FedtriError(f"{folder}: no round is finished yet; run `fedtri resume {folder}` first")
    if client not in found.clients:
        raise FedtriError(
            f"--client: {folder} has no client {client!r}; it has {', '.join(sorted(found.clients)[:12])}"
        )
    factors = ClientStore(folder / "clients", found.clients).load(client)
    assert factors is not None
    return Tuned(config, tuple(rundir.read_labels(folder)), factors)


def export(folder: Path, client: str, to: Path, *, merge: bool = False) -> None:
    """Write the client's PEFT adapter, or with `merge` the whole plain model and its tokenizer, to a new folder."""
    tuned = open_client(folder, client)
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise FedtriError(f"--to: {to} exists already; choose another folder")
    alpha = tuned.config.lora_alpha
    cohort, _, _ = load_cohort(tuned.config, tuned.labels, 1)
    if not merge:
        peft_format.write_peft(to, tuned.factors, cohort, alpha=alpha, base_model=locate(tuned.config.model))
        return
    model, tokenizer, _ = text.load(tuned.config.model, tuned.labels)
    rank = next(value.shape[0] for key, value in tuned.factors.items() if key.factor == "A")
    merged = peft_format.merge(model, tuned.factors, cohort.layout, alpha / rank)
    merged.save_pretrained(to)  # pyright: ignore[reportCallIssue]
    tokenizer.save_pretrained(to)


def predict(folder: Path, client: str, texts: Sequence[str]) -> list[Answer]:
    """What the client's tuned model says of each text, and what the model it started from says."""
    tuned = open_client(folder, client)
    config = tuned.config
    cohort, tokenizer, head = load_cohort(config, tuned.labels, 2)
    method = build(config.method, config.method_options, config.head)
    cohort.write(0, tuned.factors, config.rank, config.lora_alpha)
    cohort.write(1, start(config, cohort, head, method.basis), config.rank, config.lora_alpha)
    task = text.TextClassification(len(tuned.labels))
    examples = text.tokenize(
        tokenizer, list(texts) * 2, None, torch.zeros(2 * len(texts)).long().numpy(), config.max_length
    )
    rows = torch.arange(2 * len(texts)).numpy()
    cohort.route([0] * len(texts) + [1] * len(texts))
    with torch.inference_mode():
        batch = {
            name: value.to(config.device if config.device != "auto" else "cpu")
            for name, value in examples.batch(rows).items()
        }
        probabilities = task.logits(cohort.model, batch).softmax(-1).cpu()
    said = [(tuned.labels[int(row.argmax())], float(row.max())) for row in probabilities]
    return [Answer(t, said[i], said[len(texts) + i]) for i, t in enumerate(texts)]
