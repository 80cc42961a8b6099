"""Shared by tasks that answer in text: loss on a response's tokens, greedy answers, and how answers are judged."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from inspect import signature
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import GenerationConfig, PreTrainedTokenizerBase

from fedtri.adapters.bank import Cohort
from fedtri.errors import FedtriError
from fedtri.execution.workers import Worker, side_by_side
from fedtri.tasks import checkpoints
from fedtri.tasks.base import Batch, Rows, Scores

IGNORED = -100
"""The label of a token that carries no loss, as in PyTorch's cross-entropy."""
ExactMatch = Literal["none", "number", "text"]
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?|-?\.\d+")


def response_scores(model: nn.Module, inputs: Batch, labels: Int[Tensor, "batch tokens"]) -> Scores:
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
    """The likeliest continuation of each prompt, token by token; prompts are padded on the left. The cohort is routed
    by the caller."""
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
        cohort: Cohort,
        rows: Mapping[int, Rows],
        found: Mapping[int, Mapping[str, float]],
        answer: Callable[[Sequence[int]], list[str]],
        expected: Callable[[int], str],
    ) -> dict[int, dict[str, float]]:
        """Perplexity by slot, from the losses `found`; and the share of exact answers, where asked for.

        Args:
            answer: The model's answers to these rows, which are routed to one slot.
            expected: The response a row has in the data.
        """
        more = {slot: {"perplexity": math.exp(min(scores["loss"], 700))} for slot, scores in found.items()}
        if self.exact_match != "none":
            asked = {slot: own[: self.generations].tolist() for slot, own in rows.items() if len(own)}
            for slot, share in exact_matches(cohort, asked, answer, expected, self.exact_match).items():
                more[slot]["exact_match"] = share
        return more


def exact_matches(
    cohort: Cohort,
    rows: Mapping[int, Sequence[int]],
    answer: Callable[[Sequence[int]], list[str]],
    expected: Callable[[int], str],
    judged: ExactMatch,
    batch_size: int = 16,
) -> dict[int, float]:
    """By slot, the share of its rows that its own model answers exactly; clients side by side, but on a GPU."""

    def share(slot: int, worker: Worker) -> float:
        own, hits = rows[slot], 0
        for start in range(0, len(own), batch_size):
            if worker.stop():
                break
            chosen = own[start : start + batch_size]
            cohort.route([slot] * len(chosen))
            hits += sum(same(said, expected(row), judged) for said, row in zip(answer(chosen), chosen, strict=True))
        return hits / len(own)

    jobs = [partial(share, slot) for slot in rows]
    found = [job(Worker()) for job in jobs] if cohort.together else side_by_side(jobs)
    return dict(zip(rows, found, strict=True))


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
