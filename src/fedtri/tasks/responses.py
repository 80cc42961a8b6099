"""Shared by tasks that answer in text: loss on a response's tokens, greedy answers, and how answers are judged."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from inspect import signature
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import GenerationConfig, PreTrainedTokenizerBase

from fedtri.errors import FedtriError
from fedtri.tasks import checkpoints
from fedtri.tasks.base import Batch, Model, Rows, Scores

IGNORED = -100
"""The label of a token that carries no loss, as in PyTorch's cross-entropy."""
ExactMatch = Literal["none", "number", "text"]
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?|-?\.\d+")


def response_scores(model: Model, inputs: Batch, labels: Int[Tensor, "batch tokens"]) -> Scores:
    """Cross-entropy and hits of each sample, summed over the tokens whose label is not IGNORED.

    The token at place t is predicted from the tokens before it. If the model can, it computes logits only for the
    places that some sample needs.
    """
    wanted = labels[:, 1:]
    columns = torch.nonzero((wanted != IGNORED).any(0))[:, 0]
    if "logits_to_keep" in signature(model.forward).parameters:
        logits = model(**inputs, use_cache=False, logits_to_keep=columns).logits
    else:
        logits = model(**inputs, use_cache=False).logits[:, columns]
    logits, wanted = logits.to(torch.promote_types(logits.dtype, torch.float32)), wanted[:, columns]
    loss = cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="none", ignore_index=IGNORED)
    hits = logits.detach().argmax(-1) == wanted  # never true where ignored
    return Scores(loss.view_as(wanted).sum(1), hits.sum(1).to(loss.dtype))


def generate(model: nn.Module, tokenizer: PreTrainedTokenizerBase, inputs: Batch, max_new_tokens: int) -> list[str]:
    """The likeliest continuation of each prompt, token by token; prompts are padded on the left."""
    own: Any = getattr(model, "generation_config", None)
    known: Any = None if own is None else own.eos_token_id
    last: Any = tokenizer.eos_token_id
    ends = {int(end) for end in (*np.atleast_1d(known), last) if end is not None}
    how = GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        pad_token_id=checkpoints.pad_of(tokenizer),
        eos_token_id=sorted(ends) or None,
    )
    with torch.inference_mode():
        found = model.generate(**inputs, generation_config=how)  # pyright: ignore[reportCallIssue]
    return tokenizer.batch_decode(found[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


@dataclass(frozen=True)
class Asking:
    """Options of a task: whether the model answers test prompts, and how the answers are judged."""

    exact_match: ExactMatch
    generations: int
    max_new_tokens: int

    def __post_init__(self) -> None:
        """Raises FedtriError if either number is less than 1."""
        if self.generations < 1 or self.max_new_tokens < 1:
            raise FedtriError(
                "task_options: expected generations and max_new_tokens of at least 1, "
                f"got {self.generations} and {self.max_new_tokens}"
            )

    def metrics(
        self,
        rows: Rows,
        found: Mapping[str, float],
        answer: Callable[[Sequence[int]], list[str]],
        expected: Callable[[int], str],
    ) -> dict[str, float]:
        """Perplexity, from the loss `found`; and the share of exact answers, where asked for.

        Args:
            rows: The client's test examples.
            answer: The client's model's answers to these rows.
            expected: The response a row has in the data.
        """
        more = {"perplexity": math.exp(min(found["loss"], 700))}
        if self.exact_match != "none" and len(rows):
            more["exact_match"] = exact_matches(rows[: self.generations].tolist(), answer, expected, self.exact_match)
        return more


def exact_matches(
    rows: Sequence[int],
    answer: Callable[[Sequence[int]], list[str]],
    expected: Callable[[int], str],
    judged: ExactMatch,
    batch_size: int = 16,
) -> float:
    """The share of these rows that a model answers exactly."""
    hits = 0
    for start in range(0, len(rows), batch_size):
        chosen = rows[start : start + batch_size]
        hits += sum(same(said, expected(row), judged) for said, row in zip(answer(chosen), chosen, strict=True))
    return hits / len(rows)


def same(said: str, expected: str, judged: ExactMatch) -> bool:
    """Whether an answer is right: by its final number, or by its whole text without white space at both ends."""
    if judged == "number":
        number = final_number(expected)
        return number is not None and final_number(said) == number
    return said.strip() == expected.strip()


def final_number(text: str) -> float | None:
    """The number after the last "####" (GSM8K's mark), or else the last number of the text; None if there is none."""
    _, marked, answer = text.rpartition("####")
    found = _NUMBER.findall(answer)
    if not found:
        return None
    return float(found[0 if marked else -1].replace(",", ""))
