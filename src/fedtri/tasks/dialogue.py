"""Turns prompts, conversations and plain texts into segments. Each segment carries loss or does not."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow as pa
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from fedtri.data import pool as pools
from fedtri.data.pool import Pool, Source
from fedtri.errors import FedtriError

Template = Literal["auto", "chat", "plain"]
ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True)
class Segment:
    """A part of an example that is tokenised separately."""

    text: str
    learned: bool
    """Whether its tokens carry loss."""
    begins: bool = True
    """Whether the tokenizer's beginning-of-sequence token goes before it, if it is the first segment."""
    ends: bool = False
    """Whether the end-of-sequence token follows it."""


def conversations(source: Source) -> pa.ChunkedArray:
    """The column of conversations: each is a list of {role, content} and ends with a reply of the assistant.

    Raises FedtriError that names the first example which is not.
    """
    name = pools.column(source, "messages")
    for row, messages in enumerate(source.table[name].to_pylist(), start=1):
        if problem := _wrong(messages):
            raise FedtriError(
                f'{source.where}: column "{name}", example {row}: {problem}; expected a list of '
                '{"role": "system|user|assistant", "content": text} that ends with a reply of the assistant\'s'
            )
    return source.table[name]


def _wrong(messages: Any) -> str | None:
    if not isinstance(messages, list) or not messages:
        return "holds no messages"
    for message in messages:
        if not isinstance(message, Mapping) or message.get("role") not in ROLES:
            return f"found {str(message)[:60]!r} for a message"
        if not isinstance(message.get("content"), str):
            return "a message has no text"
        if message["role"] == "assistant" and not message["content"].strip():
            return "a reply of the assistant's is empty"
    return None if messages[-1]["role"] == "assistant" else f"the last message is the {messages[-1]['role']}'s"


def segments(
    pool: Pool, tokenizer: PreTrainedTokenizerBase, template: Template
) -> tuple[list[list[Segment]], list[str]]:
    """The segments of each example, and its last response ("" for plain text).

    Raises FedtriError if a chat template is needed but missing, or cannot be used.
    """
    table, columns = pool.table, pool.table.column_names
    if "messages" in columns:
        if not tokenizer.chat_template or template == "plain":
            _refuse(template)
        talks = [[{k: m[k] for k in ("role", "content")} for m in messages] for messages in table["messages"][:]]
        return [_turns(tokenizer, talk) for talk in talks], [talk[-1]["content"] for talk in talks]
    if "text" in columns:
        return [[Segment(text, True, ends=True)] for text in table["text"][:]], [""] * len(table)
    responses = table["response"][:]
    pairs = zip(table["prompt"][:], responses, strict=True)
    if chats(tokenizer, template):
        return [_turns(tokenizer, [_said("user", p), _said("assistant", r)]) for p, r in pairs], responses
    return [[Segment(f"{p}\n", False), Segment(r, True, ends=True)] for p, r in pairs], responses


def chats(tokenizer: PreTrainedTokenizerBase, template: Template) -> bool:
    """Whether prompts go through the tokenizer's chat template. Raises FedtriError if it is needed but missing."""
    if template == "chat" and not tokenizer.chat_template:
        _refuse(template)
    return template == "chat" or (template == "auto" and bool(tokenizer.chat_template))


def prompt(tokenizer: PreTrainedTokenizerBase, text: str, template: Template) -> Segment:
    """A user's prompt, in the form in which the model was trained to answer it."""
    if chats(tokenizer, template):
        return Segment(_rendered(tokenizer, [_said("user", text)], True), False, begins=False)
    return Segment(f"{text}\n", False)


def _refuse(template: Template) -> None:
    raise FedtriError(
        "model: conversations need a chat template, which "
        + ("task_options.template = plain rules out" if template == "plain" else "this tokenizer does not have")
        + "; choose a chat model, save a chat_template.jinja beside it, or give columns.prompt and columns.response"
    )


def _said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _turns(tokenizer: PreTrainedTokenizerBase, talk: Sequence[Mapping[str, str]]) -> list[Segment]:
    """The conversation as its template writes it, cut at the beginning and end of each reply of the assistant."""
    found, done = [], ""
    for place, message in enumerate(talk):
        if message["role"] != "assistant":
            continue
        before, after = _rendered(tokenizer, talk[:place], True), _rendered(tokenizer, talk[: place + 1], False)
        if not (before.startswith(done) and after.startswith(before)):
            raise FedtriError(
                "model: its chat template rewrites earlier messages when one is added, expected one that only adds "
                "text; give columns.prompt and columns.response, or another chat_template.jinja"
            )
        found += [Segment(before[len(done) :], False, begins=False), Segment(after[len(before) :], True)]
        done = after
    return found


def _rendered(tokenizer: PreTrainedTokenizerBase, talk: Sequence[Mapping[str, str]], asks: bool) -> str:
    try:
        text = tokenizer.apply_chat_template([dict(m) for m in talk], tokenize=False, add_generation_prompt=asks)
    except (TemplateError, ValueError, TypeError) as error:
        raise FedtriError(f"model: its chat template cannot take a conversation: {error}; correct the data") from None
    assert isinstance(text, str)
    return text
