"""Tiny models with adapters, clients with random tensors, and examples, without data files and checkpoints."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from fedtri.adapters.layout import Key
from fedtri.adapters.model import AdaptedModel, install
from fedtri.execution import build as executors
from fedtri.execution.executor import ClientModel, Executor, Optimization, Scoring, Training
from fedtri.models import loading
from fedtri.tasks.causal_lm import CausalLM, TextToContinue
from fedtri.tasks.ragged import Ragged
from fedtri.tasks.responses import IGNORED, Asking
from fedtri.tasks.text_classification import TextClassification, TextExamples
from fedtri.tasks.token_classification import TaggedTexts, TokenClassification
from tiny import SIZES, VOCABULARY, tokenizer

DECODERS = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gpt2", "gpt_neox")
ENCODERS = ("bert", "roberta", "xlm-roberta", "electra", "mpnet", "distilbert")
OTHERS = {"opt": {**SIZES["bert"], "ffn_dim": 24, "word_embed_proj_dim": 16}}
"""Models that are not fast, and whose targets "auto" does not know."""
AUTO = {
    "classify": AutoModelForSequenceClassification,
    "tag": AutoModelForTokenClassification,
    "continue": AutoModelForCausalLM,
}
EVERYTHING = frozenset("ACBSMabPH")
HOW = Optimization(steps=3, batch_size=5, learning_rate=0.01, weight_decay=0.1, clip=0.5)


def model(kind: str, task: str = "classify", seed: int = 0, **more: Any) -> nn.Module:
    """A tiny model of this architecture for this task, in float64, random weights large enough to matter."""
    special = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
    labels = {} if task == "continue" else {"num_labels": 4}
    values = {"vocab_size": len(VOCABULARY), "initializer_range": 0.3, **special, **labels}
    values |= {**(SIZES | OTHERS)[kind], **more}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return AUTO[task].from_config(AutoConfig.for_model(kind, **values)).double().eval()


def adapted(
    name: str, task: str = "classify", *, targets: str = "auto", layers: str = "all", model_options: Mapping = {}, **how
) -> AdaptedModel:
    """The same with adapters: of rank up to 4, on what "auto" adapts where nothing else is said."""
    plain = model(name, task, **model_options)
    names = [] if "P" in how.get("extra", "") else loading.find_targets(plain, targets, layers)
    head = [] if task == "continue" else loading.head_layers(plain)
    return install(plain, targets=names, head=head, rank=4, **how)


def client(on: AdaptedModel, number: int, rank: int = 3, classes: Any = None, zero: str = "") -> ClientModel:
    """A client whose tensors are random: those the model itself says moved a little."""
    rng = torch.Generator().manual_seed(number)
    factors: dict[Key, Tensor] = {}
    for key, shape in on.layout.shapes(rank).items():
        rows = len(classes) if classes is not None and key.layer in (n for n, _ in on.layout.head[-2:]) else None
        drawn = torch.randn((rows, *shape[1:]) if rows else shape, generator=rng, dtype=torch.float64)
        start = on.initial.get(key)
        factors[key] = drawn * 0.5 if start is None else start.double() + 0.05 * drawn
        if key.factor in zero:
            factors[key] = torch.zeros_like(factors[key])
    return ClientModel(f"client-{number}", factors, rank, 2.0 * rank, classes)


def texts(count: int = 40, longest: int = 14, seed: int = 0) -> list[list[int]]:
    """Token ids of texts of 2 to `longest` tokens."""
    rng = np.random.default_rng(seed)
    return [rng.integers(4, len(VOCABULARY), rng.integers(2, longest + 1)).tolist() for _ in range(count)]


def examples(task: str = "classify", *, pairs: bool = False, prompts: bool = True, **how: Any):
    """Examples of this task: 40 texts; pairs have two kinds of token; prompts carry no loss."""
    ids, rng = texts(**how), np.random.default_rng(1)
    tokens, labels = Ragged.of(ids), rng.integers(0, 4, len(ids))
    if task == "classify":
        types = Ragged.of([[0] * (len(row) // 2) + [1] * (len(row) - len(row) // 2) for row in ids]) if pairs else None
        return TextExamples(tokens, types, labels, 0)
    if task == "tag":
        tags = [[int(tag) if rng.random() < 0.6 else IGNORED for tag in rng.integers(0, 4, len(row))] for row in ids]
        tags = [[1, *row[1:]] for row in tags]
        terms = np.array([sum(tag != IGNORED for tag in row) for row in tags])
        return TaggedTexts(tokens, Ragged.of(tags), 0, terms)
    asked = [len(row) // 2 if prompts else 0 for row in ids]
    learned = [[0] * n + [1] * (len(row) - n) for n, row in zip(asked, ids, strict=True)]
    terms = np.array([sum(row[1:]) for row in learned])
    return TextToContinue(tokens, Ragged.of(learned), np.array(asked), [""] * len(ids), None, 0, terms)


def learning(task: str = "classify"):
    """The task itself."""
    if task == "continue":
        return CausalLM(tokenizer(), Asking("none", 1, 1))
    return TextClassification(4) if task == "classify" else TokenClassification(4)


def executor(on: AdaptedModel, task: str = "classify", name: str = "auto", **more: Any) -> Executor:
    """An executor by name over such examples."""
    held = more.pop("examples", None) or examples(task)
    return executors.build(on, learning(task), held, name=name, **more)


@dataclass(frozen=True)
class Found:
    """What an executor makes of some clients."""

    trained: dict[int, dict[Key, Tensor]]
    losses: Tensor
    scores: dict[int, dict[str, Tensor]]
    features: dict[int, np.ndarray]


ROWS = [np.arange(0, 13), np.arange(13, 20), np.arange(20, 40)]


def run(
    by: Executor, clients: list[ClientModel], how: Optimization = HOW, learns: frozenset[str] = EVERYTHING, **more: Any
) -> Found:
    """Train, score and take features of these clients, each with rows of its own."""
    work = [Training(one, rows, 7 + n, **more) for n, (one, rows) in enumerate(zip(clients, ROWS, strict=False))]
    trained = by.train(work, learns, how)
    scored = by.evaluate([Scoring(one, rows[::-1].copy()) for one, rows in zip(clients, ROWS, strict=False)])
    return Found(
        {number: dict(one.factors) for number, one in enumerate(trained)},
        torch.tensor([one.loss for one in trained], dtype=torch.float64),
        {n: {name: torch.tensor(value) for name, value in one.items()} for n, one in enumerate(scored)},
        dict(enumerate(by.features(ROWS))),
    )
