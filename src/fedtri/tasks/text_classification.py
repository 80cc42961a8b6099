"""Classification of texts or pairs of texts: tokenised once into flat arrays, cross-entropy, mean-pooled features."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerBase

from fedtri.data import pool as pools
from fedtri.data.pool import Pool, Source
from fedtri.models.loading import Weights
from fedtri.tasks import checkpoints, classes
from fedtri.tasks.base import Batch, Examples, Loaded, Model, Recipe, Rows, Scores, inputs_of, to_device
from fedtri.tasks.pooling import mean_pooled
from fedtri.tasks.ragged import Ragged

WHAT = "a text classifier"


def text_classification() -> Recipe:
    """The task of predicting one class for a text or a pair of texts, with an AutoModelForSequenceClassification."""
    return Recipe(
        name="text_classification",
        peft_type="SEQ_CLS",
        roles=("text", "text_pair", "label"),
        pool=pool,
        load=load,
        examples=examples,
        learning=lambda label_names, _: TextClassification(len(label_names)),
        skeleton=partial(classes.skeleton, AutoModelForSequenceClassification),
        classifies=True,
        kept=TextExamples,
        answers=answers,
    )


def pool(source: Source) -> Pool:
    """Columns "text", "label", and "text_pair" if there is one. Raises FedtriError if a column cannot be used."""
    texts = {role: pools.texts(source, role) for role in ("text", "text_pair") if _has(source, role)}
    label = pools.column(source, "label")
    used = {pools.optional(source, role) for role in texts}
    ids, names = pools.labels(source, label)
    return pools.made(source, {**texts, "label": ids}, used, names, classifies=True)


def _has(source: Source, role: str) -> bool:
    return role == "text" or pools.optional(source, role) is not None


@dataclass(frozen=True)
class TextExamples:
    """The token ids of all examples, and their classes."""

    tokens: Ragged
    types: Ragged | None
    labels: Int[np.ndarray, "n"]
    pad: int
    terms: Int[np.ndarray, "n"] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "terms", np.ones(len(self.labels), np.int64))

    @property
    def lengths(self) -> Int[np.ndarray, "n"]:
        """Tokens of each example."""
        return self.tokens.lengths

    def batch(self, rows: Rows) -> Batch:
        """input_ids, attention_mask (absent if nothing is padded), token_type_ids (if the model uses them), labels."""
        mask = self.tokens.mask(rows)
        batch = {"labels": torch.from_numpy(self.labels[rows])}
        batch["input_ids"] = self.tokens.padded(rows, mask, self.pad)
        if self.types is not None:
            batch["token_type_ids"] = self.types.padded(rows, mask, 0)
        if not mask.all():
            batch["attention_mask"] = torch.from_numpy(mask.astype(np.int64))
        return batch


def examples(pool: Pool, tokenizer: PreTrainedTokenizerBase, max_length: int) -> TextExamples:
    """The pool, tokenised."""
    pairs = pool.table["text_pair"][:] if "text_pair" in pool.table.column_names else None
    labels = pool.labels
    assert labels is not None
    return tokenize(tokenizer, pool.table["text"][:], pairs, labels, max_length)


def tokenize(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    pairs: Sequence[str] | None,
    labels: Int[np.ndarray, "n"],
    max_length: int,
) -> TextExamples:
    """Tokenise a pool once, each text (or pair) cut at max_length tokens."""
    limit = min(max_length, tokenizer.model_max_length)
    encoded = tokenizer(
        list(texts), None if pairs is None else list(pairs), truncation=True, max_length=limit,
        return_attention_mask=False,
    )  # fmt: skip
    types = encoded.get("token_type_ids")
    return TextExamples(
        tokens=Ragged.of(encoded["input_ids"]),
        types=None if types is None else Ragged.of(types),
        labels=np.asarray(labels, np.int64),
        pad=checkpoints.pad_of(tokenizer),
    )


@dataclass(frozen=True)
class TextClassification:
    """Cross-entropy over the classes of an AutoModelForSequenceClassification."""

    classes: int

    def logits(self, model: Model, batch: Batch) -> Float[Tensor, "batch classes"]:
        """The head's scores for each class."""
        return model(**inputs_of(batch)).logits

    def logits_and_classes(
        self, model: Model, batch: Batch
    ) -> tuple[Float[Tensor, "terms outputs"], Int[Tensor, "terms"]]:
        """See `Classifying`."""
        return self.logits(model, batch), batch["labels"]

    def scores(self, model: Model, batch: Batch) -> Scores:
        """Cross-entropy and whether the largest score is the label's, of each sample."""
        return classes.classified(self.logits(model, batch), batch["labels"])

    def features(self, model: Model, batch: Batch) -> Float[Tensor, "batch d"]:
        """The last hidden states' mean over real tokens."""
        return mean_pooled(model, inputs_of(batch))

    def more_metrics(
        self, model: nn.Module, examples: Examples, rows: Rows, found: Mapping[str, float]
    ) -> Mapping[str, float]:
        """None."""
        return {}


def load(model: str, label_names: Sequence[str], weights: Weights) -> Loaded:
    """A sequence classifier of these classes and its tokenizer. Raises FedtriError if it cannot be loaded as one."""
    loaded, fresh = classes.load_classifier(AutoModelForSequenceClassification, model, WHAT, weights, label_names)
    return Loaded(loaded, checkpoints.load_tokenizer(model, loaded, WHAT), fresh)


def answers(
    model: Model, tokenizer: PreTrainedTokenizerBase, label_names: Sequence[str], inputs: Sequence[str], limit: int
) -> list[str]:
    """The likeliest class of each text and its probability."""
    found = tokenize(tokenizer, inputs, None, np.zeros(len(inputs), np.int64), limit)
    batch = to_device(found.batch(np.arange(len(inputs))), model.device)
    with torch.inference_mode():
        return classes.likeliest(TextClassification(len(label_names)).logits(model, batch), label_names)
