"""Images as model inputs: decoded and cut to the model's size once, kept in 8 bits, turned into floats for each batch.

The last step of a processor, (x / 255 − mean) / deviation, is done only when a batch is made. If a processor has
another last step, its floats are kept, in four times the memory. 10,000 images of 224 × 224 take 1.5 GB in 8 bits.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, Num
from PIL import Image
from torch import Tensor, nn
from transformers import AutoImageProcessor

from fedtri.data import pool as pools
from fedtri.data.images import images as column_of_images
from fedtri.data.images import opened
from fedtri.data.pool import Pool, Source
from fedtri.errors import FedtriError
from fedtri.tasks import checkpoints
from fedtri.tasks.base import Batch, Rows

CHUNK = 64
"""The number of images that are decoded at a time."""
PATCH = 16
"""The side of a patch in pixels, if a model does not say it."""


@dataclass(frozen=True)
class Pixels:
    """Images of one size, as a processor cut them. The model's input is values · scale + shift."""

    values: Num[np.ndarray, "n 3 height width"]
    scale: Float[np.ndarray, "#channels 1 1"]
    shift: Float[np.ndarray, "#channels 1 1"]

    def batch(self, rows: Rows) -> Float[Tensor, "batch 3 height width"]:
        """These images, in float32."""
        return torch.from_numpy(self.values[rows].astype(np.float32) * self.scale + self.shift)


@dataclass(frozen=True)
class ImageExamples:
    """Images and their classes."""

    pixels: Pixels
    tokens: int
    """The number of tokens of an image in the model."""
    labels: Int[np.ndarray, "n"]

    @property
    def lengths(self) -> Int[np.ndarray, "n"]:
        """The number of tokens of each image; it is the same for all."""
        return np.full(len(self.labels), self.tokens)

    @property
    def terms(self) -> Int[np.ndarray, "n"]:
        """1 for each image: it has one class."""
        return np.ones(len(self.labels), np.int64)

    def batch(self, rows: Rows) -> Batch:
        """pixel_values (batch, 3, height, width) and labels."""
        return {"pixel_values": self.pixels.batch(rows), "labels": torch.from_numpy(self.labels[rows])}


@dataclass(frozen=True)
class ImageProcessor:
    """A checkpoint's image processor, and the number of tokens of an image in its model."""

    processor: Any
    tokens: int

    def save_pretrained(self, folder: Any) -> None:
        """Write it beside the weights, as transformers does."""
        self.processor.save_pretrained(folder)


def pool(source: Source) -> Pool:
    """Columns "image" and "label". Raises FedtriError if a column is missing or cannot be used."""
    found, label = column_of_images(source), pools.column(source, "label")
    ids, names = pools.labels(source, label)
    return pools.made(source, {"image": found, "label": ids}, {pools.column(source, "image")}, names, classifies=True)


def examples(pool: Pool, processor: ImageProcessor) -> ImageExamples:
    """The pool, decoded and cut to size. Raises FedtriError that names an image which cannot be read."""
    assert pool.labels is not None
    return ImageExamples(pixels_of(pool.table["image"], processor.processor), processor.tokens, pool.labels)


def pixels_of(images: Sequence[Any], processor: Any) -> Pixels:
    """All images (in the form of `data.images.KEPT`), processed; `CHUNK` of them are decoded at a time."""
    first = opened(images[0])
    whole = _processed(processor, [first])
    scale, shift = _last_step(processor)
    early: dict[str, bool] = {"do_rescale": False, "do_normalize": False}
    cut = _processed(processor, [first], **early)
    if cut.dtype != np.uint8 or np.abs(cut * scale + shift - whole).max() > 1e-5:
        early, cut, scale, shift = {}, whole, np.ones((1, 1, 1), np.float32), np.zeros((1, 1, 1), np.float32)
    values = np.empty((len(images), *cut.shape[1:]), cut.dtype)
    for start in range(0, len(images), CHUNK):
        chunk = [opened(image) for image in images[start : start + CHUNK]]
        values[start : start + CHUNK] = _processed(processor, chunk, **early)
    return Pixels(values, scale, shift)


def pixels(model: nn.Module, batch: Batch) -> Float[Tensor, "batch 3 height width"]:
    """The images of a batch, in the model's own number type."""
    return batch["pixel_values"].to(next(model.parameters()).dtype)


def of_files(paths: Sequence[str], processor: ImageProcessor) -> Float[Tensor, "n 3 height width"]:
    """These image files as a batch. Raises FedtriError that names a file which cannot be read."""
    kept = [{"bytes": None, "path": path, "name": path} for path in paths]
    return pixels_of(kept, processor.processor).batch(np.arange(len(kept)))


def _last_step(processor: Any) -> tuple[np.ndarray, np.ndarray]:
    """A processor's (x / 255 − mean) / deviation as x · scale + shift: (scale, shift), each (channels, 1, 1)."""
    factor = float(processor.rescale_factor) if processor.do_rescale else 1.0
    mean, deviation = (processor.image_mean, processor.image_std) if processor.do_normalize else (0.0, 1.0)
    mean, deviation = (np.atleast_1d(np.asarray(value, np.float64))[:, None, None] for value in (mean, deviation))
    return (factor / deviation).astype(np.float32), (-mean / deviation).astype(np.float32)


def _processed(processor: Any, images: Sequence[Image.Image], **more: Any) -> np.ndarray:
    return np.asarray(processor(images=list(images), return_tensors="np", **more)["pixel_values"])


def load_image_processor(model: str, loaded: nn.Module, what: str) -> ImageProcessor:
    """The processor beside the weights, in its Pillow version. Raises FedtriError if it is missing or does not fit.

    The Pillow version is always taken. That of torchvision rounds differently, and results must not depend on whether
    torchvision is installed.
    """
    return fitting(checkpoints.load_processor(AutoImageProcessor, model, what, backend="pil"), model, loaded)


def fitting(processor: Any, model: str, loaded: nn.Module) -> ImageProcessor:
    """The processor and its model's number of tokens. Raises FedtriError if the model takes images of another shape."""
    config: Any = loaded.config
    vision: Any = getattr(config, "vision_config", config)
    sizes = {_processed(processor, [Image.new("RGB", size)]).shape[1:] for size in ((40, 30), (30, 50))}
    side = _pair(getattr(vision, "image_size", None))
    channels = getattr(vision, "num_channels", 3)
    shape = min(sizes)
    if len(sizes) > 1 or channels != shape[0] or (side is not None and shape[1:] != side):
        made = " or ".join("x".join(map(str, size)) for size in sorted(sizes))
        wanted = f"{channels}x" + ("heightxwidth, one for all" if side is None else "x".join(map(str, side)))
        raise FedtriError(
            f"model: {model}: its image processor makes images of {made}, expected {wanted}; correct its "
            "preprocessor_config.json or choose another checkpoint"
        )
    patch = _pair(getattr(vision, "patch_size", None)) or (PATCH, PATCH)
    return ImageProcessor(processor, max(1, shape[1] // patch[0]) * max(1, shape[2] // patch[1]) + 1)


def _pair(value: Any) -> tuple[int, int] | None:
    """(height, width) from one number or two; None stays None."""
    return None if value is None else (value, value) if isinstance(value, int) else tuple(value)
