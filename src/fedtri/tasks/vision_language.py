"""Models that answer a prompt about an image, as LLaVA does: loss on the response only, as in causal_lm.

The image stands before its prompt, as a fixed number of image tokens. The model replaces them by the states of its
vision tower. Both towers are adapted. A model is accepted if its processor makes one grid of pixels of an image, else
it is refused.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, AutoProcessor

from fedtri.data import images as columns
from fedtri.data import pool as pools
from fedtri.data.pool import Pool, Source
from fedtri.errors import FedtriError
from fedtri.models.loading import Weights
from fedtri.tasks import checkpoints, images
from fedtri.tasks.base import Batch, Examples, Loaded, Model, Recipe, Rows, Scores, inputs_of, to_device
from fedtri.tasks.causal_lm import TextToContinue, tokenize
from fedtri.tasks.dialogue import Segment, Template
from fedtri.tasks.images import Pixels
from fedtri.tasks.pooling import mean_pooled
from fedtri.tasks.responses import Asking, ExactMatch, generate, response_scores

WHAT = "a model of images and text"


def vision_language(
    *, template: Template = "auto", exact_match: ExactMatch = "none", generations: int = 50, max_new_tokens: int = 64
) -> Recipe:
    """The task of writing a response to a prompt about an image, with an AutoModelForImageTextToText.

    Args:
        template: "chat": by the processor's chat template. "plain": image, line break, prompt, line break. "auto":
            "chat" if the processor has a template, else "plain".
        exact_match: Whether the model answers test prompts, and what is compared: "number", "text", or "none".
        generations: The largest number of test prompts that are answered for each client.
        max_new_tokens: The longest answer, in tokens.
    """
    asking = Asking(exact_match, generations, max_new_tokens)

    def learning(label_names: Sequence[str], processor: Processor) -> VisionLanguage:
        return VisionLanguage(processor.tokenizer, asking)

    return Recipe(
        name="vision_language",
        peft_type="CAUSAL_LM",
        roles=("image", "prompt", "response", "label"),
        pool=pool,
        load=load,
        examples=lambda pool, processor, limit: examples(pool, processor, limit, template),
        learning=learning,
        skeleton=partial(checkpoints.skeleton, AutoModelForImageTextToText, WHAT),
        feature_size=feature_size,
        head=lambda model: [],
    )


def pool(source: Source) -> Pool:
    """Columns "image", "prompt" and "response"; and "label" if examples have a domain.

    Raises FedtriError if a column is missing or cannot be used.
    """
    found: dict[str, Any] = {role: pools.texts(source, role) for role in ("prompt", "response")}
    found["image"] = columns.images(source)
    return pools.made_by_domain(source, found)


def feature_size(model: nn.Module) -> int:
    """The language model's hidden size."""
    config: Any = model.config
    return config.get_text_config().hidden_size


@dataclass(frozen=True)
class Processor:
    """Turns an image and a prompt into the inputs of a model."""

    processor: Any
    tokenizer: Any
    tokens: int
    """The number of image tokens for an image."""

    def save_pretrained(self, folder: Any) -> None:
        """Write it beside the weights, as transformers does."""
        self.processor.save_pretrained(folder)

    @property
    def image(self) -> str:
        """The text that stands for an image, before it is expanded."""
        return self.processor.image_token

    def expanded(self, text: str) -> str:
        """The text, with all image tokens of the image in place of the one that stands for it."""
        return text.replace(self.image, self.image * self.tokens)


def load(model: str, label_names: Sequence[str], weights: Weights) -> Loaded:
    """A model, its processor and its tokenizer.

    Raises FedtriError if it cannot be loaded, or if its inputs for an image differ from LLaVA's.
    """
    loaded, fresh = checkpoints.load_model(AutoModelForImageTextToText, model, WHAT, weights, lambda _: [])
    tokenizer = checkpoints.load_tokenizer(model, loaded, WHAT)
    processor = checkpoints.load_processor(AutoProcessor, model, WHAT, backend="pil")
    blank, made = Image.new("RGB", (40, 30)), None
    try:
        text = f"{processor.image_token}\n"
        found = processor(images=[blank], text=[text], return_tensors="np")
        place = processor.tokenizer.convert_tokens_to_ids(processor.image_token)
        made = Processor(processor, tokenizer, int((found["input_ids"] == place).sum()))
        plain = tokenizer(made.expanded(text))["input_ids"] == found["input_ids"][0].tolist()
        inputs = set(found) - {"input_ids", "attention_mask", "token_type_ids"}
        fits = plain and made.tokens > 0 and inputs == {"pixel_values"} and found["pixel_values"].ndim == 4
    except (AttributeError, TypeError, ValueError, KeyError, IndexError):
        fits = False
    if made is None or not fits:
        raise FedtriError(
            f"model: {model} lays images out in a way of its own ({type(processor).__name__}), expected one grid of "
            "pixels and one run of image tokens for an image, as in LLaVA; choose such a checkpoint"
        )
    images.fitting(processor.image_processor, model, loaded)
    return Loaded(loaded, made, fresh)


@dataclass(frozen=True)
class Seen:
    """Texts to continue, and the image of each text."""

    text: TextToContinue
    pixels: Pixels

    @property
    def lengths(self) -> Int[np.ndarray, "n"]:
        """The number of tokens of each example, with those of its image."""
        return self.text.lengths

    @property
    def terms(self) -> Int[np.ndarray, "n"]:
        """The number of response tokens of each example."""
        return self.text.terms

    @property
    def labels(self) -> Int[np.ndarray, "n"] | None:
        """The domain of each example; None if there are none."""
        return self.text.labels

    def batch(self, rows: Rows) -> Batch:
        """The inputs of the texts, and pixel_values."""
        return {**self.text.batch(rows), "pixel_values": self.pixels.batch(rows)}

    def prompts(self, rows: Sequence[int]) -> Batch:
        """Everything before the responses, padded on the left, and pixel_values."""
        return {**self.text.prompts(rows), "pixel_values": self.pixels.batch(np.asarray(rows, np.int64))}


def examples(pool: Pool, processor: Processor, max_length: int, template: Template = "auto") -> Seen:
    """The pool, tokenised and decoded. An example that is too long loses the end of its response, never its image.

    Raises FedtriError if nothing of a response is left, a text holds the image token, or an image cannot be read.
    """
    prompts, responses = pool.table["prompt"][:], pool.table["response"][:]
    for number, texts in enumerate(zip(prompts, responses, strict=True), start=1):
        if any(processor.image in text for text in texts):
            raise FedtriError(
                f"{pool.name}, example {number}: a text holds {processor.image!r}, expected the image in its own "
                "column alone; remove it from the text"
            )
    chats = _chats(processor, template)
    segments = [(_turns if chats else _plain)(processor, *texts) for texts in zip(prompts, responses, strict=True)]
    text = tokenize(processor.tokenizer, segments, max_length, "right", responses, pool.labels)
    return Seen(text, images.pixels_of(pool.table["image"], processor.processor.image_processor))


def _chats(processor: Processor, template: Template) -> bool:
    has = bool(getattr(processor.processor, "chat_template", None))
    if template == "chat" and not has:
        raise FedtriError(
            'task_options.template: "chat" needs a chat template, which this processor does not have; save a '
            'chat_template.jinja beside it, or set it to "plain"'
        )
    return has and template != "plain"


def _plain(processor: Processor, prompt: str, response: str) -> list[Segment]:
    return [
        Segment(processor.expanded(f"{processor.image}\n{prompt}\n"), False),
        Segment(response, True, ends=True),
    ]


def _turns(processor: Processor, prompt: str, response: str) -> list[Segment]:
    """The two turns as the template writes them, cut at the beginning of the response."""
    asked = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}
    said = {"role": "assistant", "content": [{"type": "text", "text": response}]}
    write = processor.processor.apply_chat_template
    before, after = write([asked], add_generation_prompt=True), write([asked, said])
    if not after.startswith(before) or before.count(processor.image) != 1:
        raise FedtriError(
            "model: its chat template rewrites the prompt when a response is added, or leaves out the image; set "
            'task_options.template to "plain"'
        )
    return [Segment(processor.expanded(before), False, begins=False), Segment(after[len(before) :], True)]


@dataclass(frozen=True)
class VisionLanguage:
    """Cross-entropy of each response token, given the image and all tokens before it. Accuracy counts tokens."""

    tokenizer: Any
    asking: Asking

    def scores(self, model: Model, batch: Batch) -> Scores:
        """Loss and hits of each sample, summed over its response's tokens."""
        return response_scores(model, _inputs(model, batch), batch["labels"])

    def features(self, model: Model, batch: Batch) -> Float[Tensor, "batch d"]:
        """The last hidden states' mean over image, prompt and response."""
        return mean_pooled(model, _inputs(model, batch))

    def more_metrics(
        self, model: Model, examples: Examples, rows: Rows, found: Mapping[str, float]
    ) -> Mapping[str, float]:
        """Perplexity; and the share of exact answers, where asked for."""
        assert isinstance(examples, Seen)
        seen = examples

        def answer(chosen: Sequence[int]) -> list[str]:
            prompts = _inputs(model, to_device(seen.prompts(chosen), model.device))
            return generate(model, self.tokenizer, prompts, self.asking.max_new_tokens)

        return self.asking.metrics(rows, found, answer, lambda row: seen.text.responses[row])


def _inputs(model: nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
    """The part of a batch that goes into the model, with images in its number type."""
    return {**inputs_of(batch), "pixel_values": images.pixels(model, batch)}
