"""Language models that answer a prompt: loss on the response only, perplexity, token accuracy, exact answers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from fedtri.data import pool as pools
from fedtri.data.pool import Pool, Source
from fedtri.errors import FedtriError
from fedtri.models.loading import Weights
from fedtri.tasks import checkpoints, dialogue
from fedtri.tasks.base import Batch, Examples, Loaded, Model, Recipe, Rows, Scores, inputs_of, to_device
from fedtri.tasks.dialogue import Segment, Template
from fedtri.tasks.pooling import mean_pooled
from fedtri.tasks.ragged import Ragged
from fedtri.tasks.responses import IGNORED, Asking, ExactMatch, generate, response_scores

WHAT = "a causal language model"


def causal_lm(
    *,
    template: Template = "auto",
    truncation: Literal["left", "right"] = "left",
    exact_match: ExactMatch = "none",
    generations: int = 50,
    max_new_tokens: int = 256,
) -> Recipe:
    """The task of writing a response to a prompt or conversation, or plain text, with an AutoModelForCausalLM.

    Args:
        template: How the model sees a prompt. "chat": by the tokenizer's chat template. "plain": as it stands, then a
            line break. "auto": "chat" if the tokenizer has a template, else "plain".
        truncation: Which end of an example is cut if it is too long. "left" cuts the beginning of the prompt, and the
            end of the response only if it alone is too long. With "right", an example that loses its whole response is
            an error.
        exact_match: Whether the model answers test prompts, and what is compared: "number", "text", or "none".
        generations: The largest number of test prompts that are answered for each client.
        max_new_tokens: The longest answer, in tokens.
    """
    asking = Asking(exact_match, generations, max_new_tokens)

    def learning(label_names: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> CausalLM:
        return CausalLM(tokenizer, asking)

    def answers(
        model: Model, tokenizer: PreTrainedTokenizerBase, _: Sequence[str], inputs: Sequence[str], limit: int
    ) -> list[str]:
        asked = [[dialogue.prompt(tokenizer, text, template)] for text in inputs]
        found = tokenize(tokenizer, asked, limit, "left", inputs, asks=True)
        prompts = to_device(found.prompts(range(len(inputs))), model.device)
        return generate(model, tokenizer, prompts, max_new_tokens)

    return Recipe(
        name="causal_lm",
        peft_type="CAUSAL_LM",
        roles=("prompt", "response", "messages", "text", "label"),
        pool=lambda source: pool(source, exact_match),
        load=load,
        examples=lambda pool, tokenizer, limit: examples(pool, tokenizer, limit, template, truncation),
        learning=learning,
        skeleton=partial(checkpoints.skeleton, AutoModelForCausalLM, WHAT),
        head=lambda model: [],
        answers=answers,
        example_input="a prompt",
    )


def pool(source: Source, exact_match: ExactMatch = "none") -> Pool:
    """Columns "prompt" and "response", or "messages", or "text"; and "label" if examples have a domain.

    If [columns] names none of them, they are looked for in this order. Raises FedtriError if none is found, or a column
    cannot be used.
    """
    given = source.columns.keys() & {"prompt", "response", "messages", "text"}
    has = {role: pools.optional(source, role) is not None for role in ("prompt", "messages", "text")}
    columns: dict[str, Any]
    if given & {"prompt", "response"} or (not given and has["prompt"]):
        columns = {role: pools.texts(source, role) for role in ("prompt", "response")}
    elif "messages" in given or (not given and has["messages"]):
        columns = {"messages": dialogue.conversations(source)}
    elif has["text"]:
        columns = {"text": pools.texts(source, "text")}
    else:
        pools.column(source, "prompt")  # says what was found and what is expected
        raise AssertionError
    if exact_match != "none" and "text" in columns:
        raise FedtriError(
            f"{source.where}: task_options.exact_match needs prompts and responses, found plain text; "
            'set it to "none" or name columns.prompt and columns.response'
        )
    return pools.made_by_domain(source, columns)


@dataclass(frozen=True)
class TextToContinue:
    """The token ids of all examples, and which tokens carry loss."""

    tokens: Ragged
    learned: Ragged
    """For each of `tokens`: 1 in a response, 0 in a prompt."""
    answered_from: Int[np.ndarray, "n"]
    """The place where the last response begins. Everything before it is the prompt for generation."""
    responses: Sequence[str]
    """The last response of each example, as it stands in the data."""
    labels: Int[np.ndarray, "n"] | None
    pad: int
    terms: Int[np.ndarray, "n"]

    @property
    def lengths(self) -> Int[np.ndarray, "n"]:
        """Tokens of each example."""
        return self.tokens.lengths

    def batch(self, rows: Rows) -> Batch:
        """input_ids, attention_mask (absent if nothing is padded) and labels.

        Padding is always on the right, because positions count from the left.
        """
        mask = self.tokens.mask(rows)
        ids = self.tokens.padded(rows, mask, self.pad)
        learned = self.learned.padded(rows, mask, 0).bool()
        batch = {"input_ids": ids, "labels": ids.masked_fill(~learned, IGNORED)}
        if not mask.all():
            batch["attention_mask"] = torch.from_numpy(mask.astype(np.int64))
        return batch

    def prompts(self, rows: Sequence[int]) -> Batch:
        """input_ids and attention_mask of everything before the last responses, padded on the left."""
        own = np.asarray(rows, np.int64)
        starts = self.tokens.offsets[own]
        parts = [self.tokens.values[a : a + n].tolist() for a, n in zip(starts, self.answered_from[own], strict=True)]
        cut = Ragged.of(parts)
        mask = cut.mask(np.arange(len(own)), left=True)
        ids = cut.padded(np.arange(len(own)), mask, self.pad)
        return {"input_ids": ids, "attention_mask": torch.from_numpy(mask.astype(np.int64))}


def examples(
    pool: Pool, tokenizer: PreTrainedTokenizerBase, max_length: int, template: Template = "auto",
    truncation: str = "left",
) -> TextToContinue:  # fmt: skip
    """The pool, tokenised. Raises FedtriError if a chat template is needed but missing, or cannot be used."""
    segments, responses = dialogue.segments(pool, tokenizer, template)
    return tokenize(tokenizer, segments, max_length, truncation, responses, pool.labels)


def tokenize(
    tokenizer: PreTrainedTokenizerBase,
    segments: Sequence[Sequence[Segment]],
    max_length: int,
    truncation: str,
    responses: Sequence[str],
    labels: Int[np.ndarray, "n"] | None = None,
    *,
    asks: bool = False,
) -> TextToContinue:
    """Tokenise each segment separately, so that a prompt has the same tokens in training and in generation.

    Args:
        tokenizer: The model's tokenizer.
        segments: The segments of each example.
        max_length: The largest number of tokens of an example.
        truncation: The end that is cut if an example is longer: "left" or "right".
        responses: The last response of each example.
        labels: The domain of each example.
        asks: Whether the examples are prompts without a response.

    Raises:
        FedtriError: If no token of a response is left.
    """
    limit = min(max_length, tokenizer.model_max_length)
    texts = [segment.text for example in segments for segment in example]
    encoded = iter(tokenizer(texts, add_special_tokens=False, return_attention_mask=False)["input_ids"])
    begin = beginning(tokenizer)
    tokens, learned, starts = [], [], []
    for number, example in enumerate(segments, start=1):
        ids = list(begin) if example[0].begins else []
        flags, start = [0] * len(ids), 0
        for segment in example:
            start = len(ids) if segment.learned else start
            ids += [*next(encoded), *([tokenizer.eos_token_id] if segment.ends else [])]
            flags += [int(segment.learned)] * (len(ids) - len(flags))
        start = len(ids) if asks else start
        # one token of the prompt stays: the response's first token is predicted from it
        most = start if asks else max(start - 1, 0)
        cut = min(max(0, len(ids) - limit), most) if truncation == "left" else 0
        ids, flags = ids[cut : cut + limit], flags[cut : cut + limit]
        if not asks and not any(flags[1:]):
            raise FedtriError(
                f"example {number}: no token of its response is left within {limit} tokens behind a prompt of {start}; "
                'raise max_length, or set task_options.truncation to "left"'
            )
        tokens.append(ids)
        learned.append(flags)
        starts.append(start - cut)
    terms = np.array([sum(row[1:]) for row in learned], np.int64)
    return TextToContinue(
        tokens=Ragged.of(tokens),
        learned=Ragged.of(learned),
        answered_from=np.array(starts, np.int64),
        responses=responses,
        labels=labels,
        pad=checkpoints.pad_of(tokenizer),
        terms=terms,
    )


def beginning(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The token that the tokenizer puts before every text, as a list; [] if it puts none."""
    bos: Any = tokenizer.bos_token_id
    return [bos] if bos is not None and tokenizer("")["input_ids"][:1] == [bos] else []


@dataclass(frozen=True)
class CausalLM:
    """Cross-entropy of each response token, given all tokens before it. Accuracy counts tokens."""

    tokenizer: PreTrainedTokenizerBase
    asking: Asking

    def scores(self, model: Model, batch: Batch) -> Scores:
        """Loss and hits of each sample, summed over its response's tokens."""
        return response_scores(model, inputs_of(batch), batch["labels"])

    def features(self, model: Model, batch: Batch) -> Float[Tensor, "batch d"]:
        """The last hidden states' mean over all real tokens, prompt and response."""
        return mean_pooled(model, inputs_of(batch))

    def more_metrics(
        self, model: Model, examples: Examples, rows: Rows, found: Mapping[str, float]
    ) -> Mapping[str, float]:
        """Perplexity; and the share of exact answers, where asked for."""
        assert isinstance(examples, TextToContinue)
        known = examples

        def answer(chosen: Sequence[int]) -> list[str]:
            prompts = to_device(known.prompts(chosen), model.device)
            return generate(model, self.tokenizer, prompts, self.asking.max_new_tokens)

        return self.asking.metrics(rows, found, answer, lambda row: known.responses[row])


def load(model: str, label_names: Sequence[str], weights: Weights) -> Loaded:
    """A causal language model and its tokenizer. Raises FedtriError if it cannot be loaded as one."""
    loaded, fresh = checkpoints.load_model(AutoModelForCausalLM, model, WHAT, weights, lambda model: [])
    tokenizer = checkpoints.load_tokenizer(model, loaded, WHAT)
    if tokenizer.eos_token_id is None:
        raise FedtriError(
            f"model: {model}: its tokenizer has no end-of-sequence token, expected one to end responses with; "
            "set eos_token in its tokenizer_config.json"
        )
    return Loaded(loaded, tokenizer, fresh)
