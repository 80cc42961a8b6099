"""A tiny world to hold a method to its laws: a model with random weights, 72 sentences on 3 topics, four clients."""

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

from fedtri.adapters.layout import Factors
from fedtri.config import Config, validated
from fedtri.execution.executor import OnStep
from fedtri.federation import loop, server
from fedtri.messages import Answer, Reply
from fedtri.method import Method
from fedtri.runs.simulation import Federation, build
from fedtri.seeds import generator
from fedtri.state import ServerState
from fedtri.storage.checkpoint import Checkpoint
from fedtri.storage.client_store import ClientStore

TOPICS = {"animals": ["cat", "dog", "bird", "fish"], "plants": ["oak", "rose", "moss", "fern"],
          "stones": ["flint", "slate", "chalk", "agate"]}  # fmt: skip
COMMON = ["the", "a", "big", "small", "old", "new", "is", "was", "near", "not"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
WORDS = [*SPECIAL, *COMMON, *(word for words in TOPICS.values() for word in words)]

SETTINGS: dict[str, Any] = {
    "columns": {"text": "sentence", "label": "topic"}, "clients": 4, "partition": "dirichlet:1.0", "rounds": 2,
    "steps": 2, "batch_size": 4, "learning_rate": 5e-3, "rank": 4, "lora_alpha": 6.0, "device": "cpu",
    "targets": "query,intermediate.dense", "max_length": 24,
}  # fmt: skip
"""Layers with d_in ≠ d_out among the adapted ones; s = alpha / rank is not 1; clients of different sizes."""


@dataclass(frozen=True)
class Moment:
    """A federation in float64 after one round, with the replies of the second at hand."""

    federation: Federation
    state: ServerState
    replies: list[Reply]


@dataclass(frozen=True)
class World:
    """A folder in which federations of one method are built."""

    folder: Path
    method: Method
    settings: dict[str, Any]
    """Keys of a configuration that the method cannot do without, such as rank."""

    @cached_property
    def model(self) -> Path:
        """The folder of the tiny model and its tokenizer."""
        folder = self.folder / "model"
        if not folder.exists():
            sizes: dict[str, Any] = {
                "num_labels": len(TOPICS),
                "vocab_size": len(WORDS),
                "max_position_embeddings": 24,
                "pad_token_id": 0,
            }
            shape = BertConfig(
                hidden_size=12, num_hidden_layers=2, num_attention_heads=2, intermediate_size=20, **sizes
            )  # fmt: skip
            with torch.random.fork_rng():
                model = BertForSequenceClassification(shape)
            rng = generator(0, "world")
            with torch.no_grad():
                for weight in (one for one in model.parameters() if one.dim() > 1):
                    weight.copy_(0.3 * torch.randn(weight.shape, generator=rng))
            model.save_pretrained(folder)
            _tokenizer().save_pretrained(folder)
        return folder

    @cached_property
    def data(self) -> Path:
        """A file of sentences; a sentence's label is its topic."""
        path = self.folder / "topics.jsonl"
        rng = random.Random(0)
        lines = []
        for number in range(72):
            topic = list(TOPICS)[number % 3]
            words = [rng.choice(TOPICS[topic] if rng.random() < 0.4 else COMMON) for _ in range(rng.randint(3, 9))]
            lines.append(json.dumps({"sentence": " ".join([rng.choice(TOPICS[topic]), *words]), "topic": topic}))
        path.write_text("\n".join(lines))
        return path

    def config(self, **values: Any) -> Config:
        """A configuration of this world; a key that is None is left out."""
        table = {**SETTINGS, "model": str(self.model), "data": str(self.data), **self.settings, **values}
        return validated({key: value for key, value in table.items() if value is not None})

    def federation(
        self,
        name: str,
        *,
        double: bool = False,
        found: Checkpoint | None = None,
        on_step: OnStep = lambda client, step, loss: None,
        **values: Any,
    ) -> Federation:
        """A federation whose clients keep their tensors in the folder of this name.

        Args:
            name: Two federations of one name share their clients' tensors.
            double: Whether it computes and sends in float64.
            found: The checkpoint that it goes on from.
            on_step: Called after every local step.
            values: Further keys of the configuration.
        """
        wire = {"wire": dict.fromkeys(("up", "down", "basis"), "float64")} if double else {}
        config = self.config(**wire, **values)
        store = ClientStore(self.folder / name, found.clients if found else None)
        built = build(config, store, on_step, self.method)
        if double:
            built.opened.adapted.model.double()
        return built

    def moment(self) -> Moment:
        """The method between aggregation and aggregation."""
        built = self.federation("moment", double=True)
        state = list(rounds(built, 1))[-1].state
        replies = trained(built, state)
        return Moment(built, server.delivered(state, built.spec.clients), replies)


def rounds(built: Federation, count: int | None = None, found: Checkpoint | None = None) -> Iterator[loop.Progress]:
    """The federation's rounds from the beginning or from a checkpoint, without a run directory."""
    schedule = built.spec.schedule if count is None else loop.Schedule(count, built.spec.schedule.fraction)
    state = found.state if found else None
    return loop.run(built.method, built.transport, built.spec.scales, schedule, state=state)


def trained(built: Federation, state: ServerState) -> list[Reply]:
    """The clients' replies to being asked to train; raises AssertionError where one fails."""
    asked = server.requests(built.method, state, built.spec.clients, state.round, "train")
    answers = built.transport.exchange(asked)
    failed = [one for one in answers if not isinstance(one, Answer)]
    assert not failed, f"the server refused a reply: {failed[0].reason}"
    return [one.reply for one in answers if isinstance(one, Answer)]


def tensors(built: Federation) -> dict[str, Factors]:
    """What each client holds on its own disk."""
    return {client: built.site.kept(client) for client in built.spec.clients}


def _tokenizer() -> PreTrainedTokenizerFast:
    """One word, one token."""
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        model_max_length=24, model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip
