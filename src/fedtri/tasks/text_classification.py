"""Classifying texts or pairs of texts: tokenised once into flat arrays, cross-entropy, mean-pooled features."""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from fedtri.errors import FedtriError
from fedtri.models import locate
from fedtri.tasks import Batch, Scores


@dataclass(frozen=True)
class TextExamples:
    """Token ids of all examples end to end; example i is tokens[offsets[i]:offsets[i + 1]]."""

    tokens: Int[np.ndarray, "total"]
    types: Int[np.ndarray, "total"] | None
    offsets: Int[np.ndarray, "n_plus_1"]
    labels: Int[np.ndarray, "n"]
    pad: int
    lengths: Int[np.ndarray, "n"] = field(init=False)
    terms: Int[np.ndarray, "n"] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "lengths", np.diff(self.offsets))
        object.__setattr__(self, "terms", np.ones(len(self.labels), np.int64))

    def batch(self, rows: Int[np.ndarray, "batch"]) -> Batch:
        """input_ids, attention_mask (absent where nothing is padded), token_type_ids where used, labels."""
        lengths = self.lengths[rows]
        width = int(lengths.max())
        mask = np.arange(width) < lengths[:, None]  # (batch, width)
        where = (self.offsets[rows][:, None] + np.arange(width))[mask]
        batch = {"labels": torch.from_numpy(self.labels[rows])}
        batch["input_ids"] = _filled(mask, self.tokens[where], self.pad)
        if self.types is not None:
            batch["token_type_ids"] = _filled(mask, self.types[where], 0)
        if not mask.all():
            batch["attention_mask"] = torch.from_numpy(mask.astype(np.int64))
        return batch


def _filled(mask: np.ndarray, values: np.ndarray, empty: int) -> Tensor:
    grid = np.full(mask.shape, empty, np.int64)
    grid[mask] = values
    return torch.from_numpy(grid)


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
    ids = encoded["input_ids"]
    types = encoded.get("token_type_ids")
    flat = np.fromiter((i for row in ids for i in row), np.int32)
    pad = tokenizer.convert_tokens_to_ids(str(tokenizer.pad_token or tokenizer.eos_token))
    assert isinstance(pad, int)
    return TextExamples(
        tokens=flat,
        types=None if types is None else np.fromiter((i for row in types for i in row), np.int8),
        offsets=np.concatenate([[0], np.cumsum([len(row) for row in ids])]).astype(np.int64),
        labels=np.asarray(labels, np.int64),
        pad=pad,
    )


@dataclass(frozen=True)
class TextClassification:
    """Cross-entropy over the classes of an AutoModelForSequenceClassification."""

    classes: int

    def logits(self, model: nn.Module, batch: Batch) -> Float[Tensor, "batch classes"]:
        """The head's scores for each class."""
        return model(**{k: v for k, v in batch.items() if k != "labels"}).logits

    def scores(self, model: nn.Module, batch: Batch) -> Scores:
        """Cross-entropy and whether the largest score is the label's, of each sample."""
        logits, labels = self.logits(model, batch), batch["labels"]
        loss = cross_entropy(logits, labels, reduction="none")
        return Scores(loss, (logits.detach().argmax(-1) == labels).to(loss.dtype))

    def feature_size(self, model: nn.Module) -> int:
        """The backbone's hidden size."""
        return model.config.hidden_size  # pyright: ignore[reportAttributeAccessIssue, reportReturnType]

    def features(self, model: nn.Module, batch: Batch) -> Float[Tensor, "batch d"]:
        """The last hidden states' mean over real tokens."""
        inputs = {k: v for k, v in batch.items() if k != "labels"}
        backbone = model.base_model
        assert isinstance(backbone, nn.Module)
        hidden = backbone(**inputs).last_hidden_state  # (batch, tokens, d)
        if (mask := batch.get("attention_mask")) is None:
            return hidden.mean(1)
        weight = mask.to(hidden.dtype)[..., None]
        return (hidden * weight).sum(1) / weight.sum(1)


def load(model: str, label_names: Sequence[str]) -> tuple[nn.Module, PreTrainedTokenizerBase, set[str]]:
    """Model, tokenizer, and the names of the parameters the checkpoint did not have (a fresh head's).

    Raises FedtriError in one line where the folder or hub name cannot be loaded as a sequence classifier.
    """
    where = locate(model)
    names = dict(enumerate(label_names))
    try:
        with _quiet():
            loaded, info = AutoModelForSequenceClassification.from_pretrained(
                where, num_labels=len(names), id2label=names, label2id={v: k for k, v in names.items()},
                ignore_mismatched_sizes=True, output_loading_info=True,
            )  # fmt: skip
            tokenizer = AutoTokenizer.from_pretrained(where)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise FedtriError(
            f"model: {model} cannot be loaded as a text classifier: {reason}; expected a folder or hub name with "
            "config.json, weights and tokenizer"
        ) from None
    _check_whole(model, loaded, tokenizer, info["missing_keys"])
    if loaded.config.pad_token_id is None and tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if loaded.config.pad_token_id is None:
        loaded.config.pad_token_id = tokenizer.pad_token_id
    mismatched = {name for name, *_ in info["mismatched_keys"]}
    return loaded, tokenizer, set(info["missing_keys"]) | mismatched


def _check_whole(model: str, loaded: nn.Module, tokenizer: PreTrainedTokenizerBase, missing: Collection[str]) -> None:
    """transformers fills what a checkpoint lacks at random and invents an empty vocabulary; a run must not."""
    backbone = f"{loaded.base_model_prefix}."
    if lacking := sorted(name for name in missing if name.startswith(backbone)):
        others = f" and {len(lacking) - 1} others" if len(lacking) > 1 else ""
        raise FedtriError(
            f"model: {model} has no weights for {lacking[0]}{others}, expected all of the backbone's; "
            "choose a complete checkpoint"
        )
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise FedtriError(f"model: {model} has no vocabulary, expected a tokenizer beside the weights; save one there")
    if tokenizer.model_max_length > 1e6:  # it says none: then the model's positions, of which some reserve two
        tokenizer.model_max_length = getattr(loaded.config, "max_position_embeddings", 10**6) - 2


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence transformers' loading report: a fresh head is expected here."""
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
