"""Image classification: any AutoModelForImageClassification, cross-entropy, mean-pooled features."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import AutoModelForImageClassification

from fedtri.models.loading import Weights, backbone_of
from fedtri.tasks import classes, images
from fedtri.tasks.base import Batch, Examples, Loaded, Model, Recipe, Rows, Scores

WHAT = "an image classifier"


def image_classification() -> Recipe:
    """The task of predicting one class for an image, with an AutoModelForImageClassification. It has no options."""
    return Recipe(
        name="image_classification",
        peft_type=None,
        roles=("image", "label"),
        pool=images.pool,
        load=load,
        examples=lambda pool, processor, _: images.examples(pool, processor),
        learning=lambda label_names, _: ImageClassification(len(label_names)),
        skeleton=partial(classes.skeleton, AutoModelForImageClassification),
        feature_size=feature_size,
        classifies=True,
        answers=answers,
        example_input="picture.png",
    )


def load(model: str, label_names: Sequence[str], weights: Weights) -> Loaded:
    """An image classifier of these classes and its processor. Raises FedtriError if it cannot be loaded as one."""
    loaded, fresh = classes.load_classifier(AutoModelForImageClassification, model, WHAT, weights, label_names)
    return Loaded(loaded, images.load_image_processor(model, loaded, WHAT), fresh)


def feature_size(model: nn.Module) -> int:
    """The backbone's hidden size; that of the last stage if it has several stages."""
    config: Any = model.get_submodule(backbone_of(model)).config
    stages = getattr(config, "hidden_sizes", None)
    return stages[-1] if stages else config.hidden_size


@dataclass(frozen=True)
class ImageClassification:
    """Cross-entropy over the classes of an AutoModelForImageClassification."""

    classes: int

    def logits(self, model: Model, batch: Batch) -> Float[Tensor, "batch classes"]:
        """The head's scores for each class."""
        return model(pixel_values=images.pixels(model, batch)).logits

    def logits_and_classes(
        self, model: Model, batch: Batch
    ) -> tuple[Float[Tensor, "terms outputs"], Int[Tensor, "terms"]]:
        """See `Classifying`."""
        return self.logits(model, batch), batch["labels"]

    def scores(self, model: Model, batch: Batch) -> Scores:
        """Cross-entropy and whether the largest score is the label's, of each sample."""
        return classes.classified(self.logits(model, batch), batch["labels"])

    def features(self, model: Model, batch: Batch) -> Float[Tensor, "batch d"]:
        """The last hidden states' mean over all tokens, or over all places of a feature map."""
        backbone = model.get_submodule(backbone_of(model))
        hidden = backbone(pixel_values=images.pixels(model, batch)).last_hidden_state
        return hidden.mean(1) if hidden.dim() == 3 else hidden.mean((2, 3))

    def more_metrics(
        self, model: nn.Module, examples: Examples, rows: Rows, found: Mapping[str, float]
    ) -> Mapping[str, float]:
        """None."""
        return {}


def answers(
    model: Model, processor: images.ImageProcessor, label_names: Sequence[str], inputs: Sequence[str], limit: int
) -> list[str]:
    """The likeliest class of each image file and its probability."""
    batch = {"pixel_values": images.of_files(inputs, processor).to(model.device)}
    with torch.inference_mode():
        return classes.likeliest(ImageClassification(len(label_names)).logits(model, batch), label_names)
