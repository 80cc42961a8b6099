"""Image classification by texts, as CLIP does it: the class of an image is the one with the most similar prompt.

    p(class | image) ∝ exp(t · cos(image tower(image), text tower(prompt of the class)))     t: the model's own scale

Both towers are adapted and there is no head: classes are words, so clients may differ in them and a new one needs only
its name.
Source: CLIP, arXiv:2103.00020, section 3.1.4.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import normalize
from transformers import AutoModel, CLIPModel, PretrainedConfig

from fedtri.adapters.layer import precision
from fedtri.errors import FedtriError
from fedtri.models.loading import Weights
from fedtri.tasks import checkpoints, classes, images
from fedtri.tasks.base import Batch, Examples, Loaded, Model, Recipe, Rows, Scores

WHAT = "a CLIP model"


def image_text(*, prompt: str = "a photo of a {}") -> Recipe:
    """The task of predicting one class for an image, with a CLIPModel.

    Args:
        prompt: The text for a class; its name goes where {} is.

    Raises:
        FedtriError: If `prompt` does not hold {} exactly once.
    """
    if prompt.count("{}") != 1:
        raise FedtriError(
            f"task_options.prompt: expected a text with one {{}}, where the class's name goes, got {prompt!r}"
        )
    return Recipe(
        name="image_text",
        peft_type=None,
        roles=("image", "label"),
        pool=images.pool,
        load=load,
        examples=lambda pool, processor, _: images.examples(pool, processor.images),
        learning=partial(learning, prompt),
        skeleton=skeleton,
        feature_size=feature_size,
        head=lambda model: [],
        classifies=True,
        answers=partial(answers, prompt),
        example_input="picture.png",
    )


def skeleton(config: PretrainedConfig) -> nn.Module:
    """A CLIP model without weights. Raises FedtriError if the configuration is of another type."""
    if config.model_type != "clip":
        raise FedtriError(
            f"model: {config.name_or_path} is of type {config.model_type!r}, expected {WHAT} for task image_text"
        )
    return AutoModel.from_config(config)


def feature_size(model: nn.Module) -> int:
    """The dimension of the space into which both towers project."""
    config: Any = model.config
    return config.projection_dim


@dataclass(frozen=True)
class Processor:
    """Turns images and prompts into the inputs of a CLIP model."""

    images: images.ImageProcessor
    tokenizer: Any
    limit: int
    """The largest number of tokens that the text tower takes."""
    end: int | None
    """The id of the token whose state represents a prompt; None if that is the token with the largest id."""

    def save_pretrained(self, folder: Any) -> None:
        """Write both beside the weights, as transformers does."""
        self.images.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)


def load(model: str, label_names: Sequence[str], weights: Weights) -> Loaded:
    """A CLIP model, its image processor and its tokenizer. Raises FedtriError if it cannot be loaded as one."""
    loaded, fresh = checkpoints.load_model(CLIPModel, model, WHAT, weights, lambda _: [])
    config: Any = loaded.config
    text = config.text_config
    return Loaded(
        loaded,
        Processor(
            images.load_image_processor(model, loaded, WHAT),
            checkpoints.load_tokenizer(model, loaded, WHAT),
            text.max_position_embeddings,
            None if text.eos_token_id == 2 else text.eos_token_id,  # as CLIPTextModel has it
        ),
        fresh,
    )


def learning(prompt: str, label_names: Sequence[str], processor: Processor) -> "ImageText":
    """Scores images against the prompts of these classes. Raises FedtriError if one is too long or occurs twice."""
    texts = [prompt.format(name) for name in label_names]
    found = processor.tokenizer(texts)["input_ids"]
    for text, ids in zip(texts, found, strict=True):
        if len(ids) > processor.limit or (processor.end is not None and processor.end not in ids):
            what = f"{len(ids)} tokens" if len(ids) > processor.limit else "no end of text"
            raise FedtriError(
                f"task_options.prompt: {text!r} has {what}, expected at most {processor.limit} tokens and an end; "
                "shorten it or the class's name, or correct the tokenizer"
            )
    for place, ids in enumerate(found):
        if (first := found.index(ids)) < place:
            raise FedtriError(
                f"task_options.prompt: classes {label_names[first]!r} and {label_names[place]!r} make the same tokens "
                f"of {texts[place]!r}, expected a prompt of its own for each; rename one of them"
            )
    batch = processor.tokenizer(texts, padding=True, return_tensors="pt")
    return ImageText(len(texts), batch["input_ids"], batch["attention_mask"])


@dataclass(frozen=True)
class ImageText:
    """Cross-entropy over the similarities between an image and the prompts of all classes."""

    classes: int
    prompts: Int[Tensor, "classes tokens"]
    mask: Int[Tensor, "classes tokens"]

    def logits(self, model: Model, batch: Batch) -> Float[Tensor, "batch classes"]:
        """Each image's similarity to every prompt, times the model's scale."""
        image = embedding(model, batch)
        ids, mask = self.prompts.to(image.device), self.mask.to(image.device)
        text = model.get_text_features(input_ids=ids, attention_mask=mask).pooler_output
        text = normalize(text.to(image.dtype), dim=-1)  # (classes, d)
        return model.logit_scale.to(image.dtype).exp() * image @ text.mT

    def scores(self, model: Model, batch: Batch) -> Scores:
        """Cross-entropy and whether the nearest prompt is the label's, of each sample."""
        return classes.classified(self.logits(model, batch), batch["labels"])

    def features(self, model: Model, batch: Batch) -> Float[Tensor, "batch d"]:
        """The image's embedding, of length 1."""
        return embedding(model, batch)

    def more_metrics(
        self, model: nn.Module, examples: Examples, rows: Rows, found: Mapping[str, float]
    ) -> Mapping[str, float]:
        """None."""
        return {}


def embedding(model: Any, batch: Batch) -> Float[Tensor, "batch d"]:
    """The image tower's projection of each image, of length 1."""
    found = model.get_image_features(pixel_values=images.pixels(model, batch)).pooler_output
    return normalize(found.to(precision(found)), dim=-1)


def answers(
    prompt: str, model: Model, processor: Processor, label_names: Sequence[str], inputs: Sequence[str], limit: int
) -> list[str]:
    """The likeliest class of each image file and its probability."""
    batch = {"pixel_values": images.of_files(inputs, processor.images).to(model.device)}
    with torch.inference_mode():
        return classes.likeliest(learning(prompt, label_names, processor).logits(model, batch), label_names)
