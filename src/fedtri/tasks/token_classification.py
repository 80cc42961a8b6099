"""Tagging the words of a text: one class for each word, scored at the word's first token."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoModelForTokenClassification, PreTrainedTokenizerBase

from fedtri.data import pool as pools
from fedtri.data.pool import Pool, Source
from fedtri.errors import FedtriError
from fedtri.models.loading import Weights
from fedtri.tasks import checkpoints, classes
from fedtri.tasks.base import Batch, Examples, Loaded, Model, Recipe, Rows, Scores, inputs_of, to_device
from fedtri.tasks.pooling import mean_pooled
from fedtri.tasks.ragged import Ragged
from fedtri.tasks.responses import IGNORED

WHAT = "a token classifier"


def token_classification() -> Recipe:
    """The task of predicting one class for each word of a text, with an AutoModelForTokenClassification."""
    return Recipe(
        name="token_classification",
        peft_type="TOKEN_CLS",
        roles=("tokens", "tags"),
        pool=pool,
        load=load,
        examples=examples,
        learning=lambda label_names, _: TokenClassification(len(label_names)),
        skeleton=partial(checkpoints.skeleton, AutoModelForTokenClassification, WHAT),
        sketch_classes=lambda label_names: 1,
        answers=answers,
    )


def pool(source: Source) -> Pool:
    """Columns "tokens" (lists of words) and "tags" (one id for each word). Sketches have no classes here.

    Raises FedtriError if a column holds something else, or an example has not as many tags as words.
    """
    names = {role: pools.column(source, role) for role in ("tokens", "tags")}
    words, tags = (source.table[name].to_pylist() for name in names.values())
    for row, (some, own) in enumerate(zip(words, tags, strict=True), start=1):
        where = f"{source.where}: example {row}"
        if not isinstance(some, list) or not some or not all(isinstance(word, str) and word.strip() for word in some):
            raise FedtriError(f'{where}: column "{names["tokens"]}" holds {str(some)[:60]}, expected a list of words')
        if not isinstance(own, list) or len(own) != len(some):
            count = len(own) if isinstance(own, list) else "no"
            raise FedtriError(
                f"{where}: {len(some)} words and {count} tags, expected as many; see columns.tokens and columns.tags"
            )
    flat = pa.table({"tag": [tag for own in tags for tag in own]})
    found = {"tag": source.names[names["tags"]]} if names["tags"] in source.names else {}
    ids, label_names = pools.labels(Source(source.name, source.where, flat, {"label": "tag"}, found), "tag")
    if len(label_names) < 2:
        raise FedtriError(
            f'{source.where}: column "{names["tags"]}" holds one tag, expected at least two to tell apart'
        )
    ends = np.cumsum([0, *map(len, tags)])
    columns = {
        "tokens": source.table[names["tokens"]],
        "tags": [ids[a:b] for a, b in pairwise(ends)],
    }
    return pools.made(source, columns, {*names.values(), "label"}, label_names)


@dataclass(frozen=True)
class TaggedTexts:
    """The token ids of all examples, and for each token the class of the word that begins there, else IGNORED."""

    tokens: Ragged
    tags: Ragged
    pad: int
    terms: Int[np.ndarray, "n"]
    labels: None = None

    @property
    def lengths(self) -> Int[np.ndarray, "n"]:
        """Tokens of each example."""
        return self.tokens.lengths

    def batch(self, rows: Rows) -> Batch:
        """input_ids, attention_mask (absent where nothing is padded), labels (batch, tokens)."""
        mask = self.tokens.mask(rows)
        batch = {
            "input_ids": self.tokens.padded(rows, mask, self.pad),
            "labels": self.tags.padded(rows, mask, IGNORED),
        }
        if not mask.all():
            batch["attention_mask"] = torch.from_numpy(mask.astype(np.int64))
        return batch


def examples(pool: Pool, tokenizer: PreTrainedTokenizerBase, max_length: int) -> TaggedTexts:
    """The pool, tokenised. Words beyond max_length tokens are cut off and not scored."""
    return tokenize(tokenizer, pool.table["tokens"][:], pool.table["tags"][:], max_length)


def tokenize(
    tokenizer: PreTrainedTokenizerBase, words: Sequence[Sequence[str]], tags: Sequence[Sequence[int]], max_length: int
) -> TaggedTexts:
    """Tokenise texts that are split into words. Raises FedtriError if the tokenizer is not a fast one."""
    if not tokenizer.is_fast:
        raise FedtriError("model: token_classification needs a fast tokenizer; save a tokenizer.json beside the model")
    limit = min(max_length, tokenizer.model_max_length)
    encoded = tokenizer([list(w) for w in words], is_split_into_words=True, truncation=True, max_length=limit)
    found = []
    for row, own in enumerate(tags):
        places: list[Any] = encoded.word_ids(row)
        first = [word is not None and word != before for word, before in zip(places, [None, *places], strict=False)]
        found.append([own[word] if begins else IGNORED for word, begins in zip(places, first, strict=True)])
    terms = np.array([sum(tag != IGNORED for tag in row) for row in found], np.int64)
    return TaggedTexts(Ragged.of(encoded["input_ids"]), Ragged.of(found), checkpoints.pad_of(tokenizer), terms)


@dataclass(frozen=True)
class TokenClassification:
    """Cross-entropy over the classes, at each word's first token. Accuracy counts words."""

    tags: int

    def scores(self, model: Model, batch: Batch) -> Scores:
        """Loss and hits of each text, summed over its words."""
        logits, labels = model(**inputs_of(batch)).logits, batch["labels"]
        loss = cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none", ignore_index=IGNORED)
        hits = logits.detach().argmax(-1) == labels  # never true where ignored
        return Scores(loss.view_as(labels).sum(1), hits.sum(1).to(loss.dtype))

    def logits_and_classes(
        self, model: Model, batch: Batch
    ) -> tuple[Float[Tensor, "terms outputs"], Int[Tensor, "terms"]]:
        """See `Classifying`; a term is a word."""
        real = batch["labels"] != IGNORED
        return model(**inputs_of(batch)).logits[real], batch["labels"][real]

    def features(self, model: Model, batch: Batch) -> Float[Tensor, "batch d"]:
        """The last hidden states' mean over real tokens."""
        return mean_pooled(model, inputs_of(batch))

    def more_metrics(
        self, model: nn.Module, examples: Examples, rows: Rows, found: Mapping[str, float]
    ) -> Mapping[str, float]:
        """None."""
        return {}


def load(model: str, label_names: Sequence[str], weights: Weights) -> Loaded:
    """A token classifier of these classes and its tokenizer. Raises FedtriError if it cannot be loaded as one."""
    loaded, fresh = classes.load_classifier(AutoModelForTokenClassification, model, WHAT, weights, label_names)
    return Loaded(loaded, checkpoints.load_tokenizer(model, loaded, WHAT), fresh)


def answers(
    model: Model, tokenizer: PreTrainedTokenizerBase, label_names: Sequence[str], inputs: Sequence[str], limit: int
) -> list[str]:
    """The likeliest class of each word, words being what white space divides; "…" for what is beyond the limit."""
    words = [text.split() for text in inputs]
    found = tokenize(tokenizer, words, [[0] * len(own) for own in words], limit)
    batch = to_device(found.batch(np.arange(len(inputs))), model.device)
    with torch.inference_mode():
        best = model(**inputs_of(batch)).logits.argmax(-1)
    said = []
    for own, places, labels in zip(words, best, batch["labels"], strict=True):
        tags = [label_names[int(c)] for c in places[labels != IGNORED]]
        pairs = [f"{word}/{tag}" for word, tag in zip(own, tags, strict=False)]
        said.append(" ".join(pairs + ["…"] * (len(tags) < len(own))))
    return said
