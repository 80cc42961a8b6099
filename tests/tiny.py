"""What the tests are about: tiny models of many architectures, a tokenizer, a data file, whole federations of them."""

import csv
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerFast,
)

from fedtri import config
from fedtri.adapters.factors import effective_update
from fedtri.adapters.layout import Factors, Key
from fedtri.adapters.model import load
from fedtri.execution.executor import OnStep, Scoring
from fedtri.federation import loop
from fedtri.runs import simulation
from fedtri.runs.opening import Machine, open_model
from fedtri.runs.spec import spec_of
from fedtri.storage.client_store import ClientStore
from fedtri.testing.compare import assert_same as assert_same
from tiny_images import IMAGE_MODELS, SHAPE, save_questions

LABELS = ("animals", "plants", "stones")
WORDS = {
    "animals": ["cat", "dog", "horse", "mouse", "bird", "fish"],
    "plants": ["oak", "rose", "grass", "moss", "fern", "lily"],
    "stones": ["flint", "slate", "marble", "chalk", "quartz", "agate"],
}
COMMON = ["the", "a", "big", "small", "old", "new", "is", "was", "seen", "near", "far", "by", "and", "not", "very"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
VOCABULARY = SPECIAL + COMMON + [word for words in WORDS.values() for word in words]

_ENCODER = {**SHAPE, "max_position_embeddings": 40}
_DECODER = {**_ENCODER, "num_key_value_heads": 2}
SIZES: dict[str, dict[str, Any]] = {
    "bert": _ENCODER,
    "roberta": _ENCODER,
    "xlm-roberta": _ENCODER,
    "electra": {**_ENCODER, "embedding_size": 12},
    "mpnet": _ENCODER,
    "distilbert": {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24, "max_position_embeddings": 40},
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_inner": 24, "n_positions": 40},
    "llama": _DECODER,
    "mistral": {**_DECODER, "head_dim": 8},
    "qwen2": {**_DECODER, "num_key_value_heads": 1},
    "qwen3": {**_DECODER, "num_key_value_heads": 1, "head_dim": 8},
    "gemma": {**_DECODER, "num_key_value_heads": 1, "head_dim": 8},
    "gpt_neox": _ENCODER,
}
DECODERS = {"gpt2", "llama", "mistral", "qwen2", "qwen3", "gemma", "gpt_neox"}


def classifier(kind: str, *, labels: int = 3, seed: int = 0, **more: Any) -> torch.nn.Module:
    """A sequence classifier of this architecture: two layers, 16 wide, random weights large enough to matter."""
    special = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
    shape = AutoConfig.for_model(
        kind, vocab_size=len(VOCABULARY), num_labels=labels, initializer_range=0.3, **special, **(SIZES[kind] | more)
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return AutoModelForSequenceClassification.from_config(shape).eval()


def tokenizer(kind: str = "bert") -> PreTrainedTokenizerFast:
    """One word, one token."""
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    inputs = ["input_ids", "attention_mask"] + ["token_type_ids"] * (kind == "bert")
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        model_max_length=40, model_input_names=inputs,
    )  # fmt: skip


CHAT = (
    "{% for m in messages %}{{ '[' + m['role'] + '] ' + m['content'] + ' [SEP] ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant] ' }}{% endif %}"
)
"""A chat template: who speaks, what is said, the end."""


def save_language_model(folder: Path, kind: str, *, chat: bool = False) -> Path:
    """A causal language model of this architecture and its tokenizer, which begins texts with [CLS]."""
    special = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
    shape = AutoConfig.for_model(kind, vocab_size=len(VOCABULARY), initializer_range=0.3, **special, **SIZES[kind])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(shape).save_pretrained(folder)
    words = tokenizer(kind)
    words.bos_token, words.eos_token = "[CLS]", "[SEP]"
    words.chat_template = CHAT if chat else None
    words.save_pretrained(folder)
    return folder


def save_dialogues(path: Path, rows: int = 120, seed: int = 0) -> Path:
    """JSON lines of prompts that name a topic, responses of words on it, and the topic."""
    rng = random.Random(seed)
    lines = []
    for i in range(rows):
        topic = LABELS[i % 3]
        asked = [*rng.choices(COMMON, k=rng.randint(2, 9)), WORDS[topic][i % 6]]
        said = rng.choices(WORDS[topic], k=rng.randint(2, 4))
        lines.append(json.dumps({"prompt": " ".join(asked), "response": " ".join(said), "topic": topic}))
    path.write_text("\n".join(lines))
    return path


def save_tagged(path: Path, rows: int = 120, seed: int = 0) -> Path:
    """JSON lines of words and what each is about, "none" for those about nothing."""
    rng = random.Random(seed)
    topic_of = {word: topic for topic, words in WORDS.items() for word in words}
    lines = []
    for _ in range(rows):
        words = rng.choices([*COMMON, *topic_of], k=rng.randint(3, 12))
        lines.append(json.dumps({"tokens": words, "tags": [topic_of.get(word, "none") for word in words]}))
    path.write_text("\n".join(lines))
    return path


def save_model(folder: Path, kind: str) -> Path:
    """A folder as a user would point `model` at."""
    for part in IMAGE_MODELS[kind]() if kind in IMAGE_MODELS else (classifier(kind), tokenizer(kind)):
        part.save_pretrained(folder)
    return folder


def save_data(path: Path, rows: int = 120, seed: int = 0) -> Path:
    """A CSV of sentences of 3 to 12 words; the label is what the sentence is about."""
    rng = random.Random(seed)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["sentence", "topic"])
        for i in range(rows):
            label = LABELS[i % 3]
            words = [rng.choice(WORDS[label] if rng.random() < 0.4 else COMMON) for _ in range(rng.randint(3, 12))]
            writer.writerow([" ".join([rng.choice(WORDS[label]), *words]), label])
    return path


@dataclass(frozen=True)
class Lab:
    """A folder with models and data, from which whole federations are built."""

    folder: Path

    def model(self, kind: str = "bert") -> Path:
        path = self.folder / kind
        return path if path.exists() else save_model(path, kind)

    @property
    def questions(self) -> Path:
        path = self.folder / "seen"
        return path / "questions.csv" if path.exists() else save_questions(path)

    @property
    def data(self) -> Path:
        path = self.folder / "topics.csv"
        return path if path.exists() else save_data(path)

    def language(self, kind: str = "llama", *, chat: bool = False, **values: Any) -> config.Config:
        """The config of a federation that learns to answer, or with other data to continue texts."""
        model, data = self.folder / f"{kind}-lm{'-chat' * chat}", self.folder / "dialogues.jsonl"
        if not model.exists():
            save_language_model(model, kind, chat=chat)
        if not data.exists():
            save_dialogues(data)
        speaks = {"task": "causal_lm", "columns": {"label": "topic"}, "targets": "auto", "data": str(data)}
        return self.config(**(speaks | {"model": str(model)} | values))

    def tagging(self, **values: Any) -> config.Config:
        """The config of a federation that learns to tag words."""
        data = self.folder / "tagged.jsonl"
        if not data.exists():
            save_tagged(data)
        tags = {"task": "token_classification", "columns": {}, "partition": "iid", "data": str(data)}
        return self.config(**(tags | values))

    def config(self, kind: str = "bert", **values: Any) -> config.Config:
        """A config as its file would say it; dots reach into tables as with --set."""
        table: dict[str, Any] = {}
        for key, value in (DEFAULTS | {"model": str(self.model(kind)), "data": str(self.data)} | values).items():
            *path, last = key.split("__")
            inner = table
            for name in path:
                inner[name] = inner = dict(inner.get(name, {}))
            inner[last] = value
        return config.validated(table)

    def federation(
        self,
        store: Path,
        *,
        double: bool = False,
        of: str = "config",
        on_step: OnStep = lambda client, step, loss: None,
        **values: Any,
    ) -> simulation.Federation:
        """A federation with its clients' tensors under `store`; in float64, on the wire too, where `double`.

        `of` is the method that makes its config: config, language, tagging.
        """
        values |= {"wire__up": "float64", "wire__down": "float64", "wire__basis": "float64"} if double else {}
        built = simulation.build(getattr(self, of)(**values), ClientStore(store), on_step)
        if double:
            built.opened.adapted.model.double()
        return built


DEFAULTS: dict[str, Any] = {
    "columns": {"text": "sentence", "label": "topic"},
    "clients": 4,
    "partition": "dirichlet:1.0",
    "rounds": 2,
    "steps": 3,
    "batch_size": 4,
    "learning_rate": 5e-3,
    "rank": 3,
    "lora_alpha": 6.0,
    "targets": "query,intermediate.dense",
    "device": "cpu",
}

NEEDS: dict[str, dict[str, Any]] = {"ravan": {"rank": 4}}
"""Config a method cannot do without, by name; a method that is not here is held to the laws with its defaults."""


def rounds(built: simulation.Federation, **changes: Any) -> Iterator[loop.Progress]:
    """The federation's rounds, without a run directory."""
    schedule = replace(built.spec.schedule, **changes)
    return loop.run(built.method, built.transport, built.spec.scales, schedule)


def carry(built: simulation.Federation, client: str, factors: Factors | None = None) -> torch.nn.Module:
    """A federation's model with this client's tensors in it: those it holds, or others."""
    site = built.site
    own = site.model(client, site.kept(client) if factors is None else factors)
    load(built.opened.adapted, own.factors, rank=own.rank, alpha=own.alpha, classes=own.classes)
    return built.opened.adapted.model


def opened_again(of: config.Config, factors: Factors, labels: Sequence[str]) -> tuple[torch.nn.Module, Any]:
    """The model of a configuration with these tensors in it, and its processor."""
    opened = open_model(spec_of(of, [f"client-{n:02}" for n in range(of.clients)], labels), Machine.of(of))
    rank = next((value.shape[0] for key, value in factors.items() if key.factor == "A"), 1)
    load(opened.adapted, factors, rank=rank, alpha=of.lora_alpha)
    return opened.adapted.model, opened.processor


def clients_tensors(built: simulation.Federation) -> dict[str, Factors]:
    """What each client holds on its own disk."""
    site = built.site
    return {client: site.kept(client) for client in built.transport.clients()}


def training_loss(built: simulation.Federation) -> float:
    """The clients' mean loss on their own training examples, with what each holds now."""
    site = built.site
    work = [
        Scoring(site.model(client, factors), site.splits[client].train, further=False)
        for client, factors in clients_tensors(built).items()
    ]
    losses = [scores["loss"] for scores in site.executor.evaluate(work)]
    return sum(losses) / len(losses)


def effective(factors: Mapping[Key, Tensor], layer: str, scale: float = 1.0) -> Tensor:
    """ΔW, with the dense residual of the methods that have one."""
    return effective_update(factors, layer, scale) + factors.get(Key(layer, "W"), torch.zeros(()))
