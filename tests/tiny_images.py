"""Tiny models that see images, 8 x 8 pixels in patches of 4, and folders of images."""

import csv
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

SHAPE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
"""Of every tower and of tiny.py's models."""
PATCHES = {**SHAPE, "image_size": 8, "patch_size": 4}
DIGITS: dict[str, Any] = {
    "data": "digits", "columns": {}, "data_options__limit": 160, "targets": "auto", "steps": 4, "learning_rate": 1e-2,
}  # fmt: skip
"""What a lab's config needs for the embedded images."""


def vit(labels: int = 10, seed: int = 0) -> tuple[Any, ...]:
    """A tiny ViT and its processor."""
    shape = ViTConfig(**PATCHES, num_labels=labels, initializer_range=0.1)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return ViTForImageClassification(shape).eval(), ViTImageProcessorPil(size={"height": 8, "width": 8})


def clip(seed: int = 0) -> tuple[Any, ...]:
    """A tiny CLIP, its image processor and a tokenizer: one word or digit, one token; the first is the padding."""
    words = ["[PAD]", "[UNK]", "<start>", "<end>", *"0123456789", "a", "photo", "of", "the", "digit", "red", "blue"]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", 2), ("<end>", 3)]
    )
    texts = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="[PAD]", unk_token="[UNK]", bos_token="<start>", eos_token="<end>",
        model_max_length=12,
    )  # fmt: skip
    text = {**SHAPE, "vocab_size": len(words), "max_position_embeddings": 12}
    text |= {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "initializer_range": 0.2}
    shape = CLIPConfig(
        text_config=text, vision_config={**PATCHES, "initializer_range": 0.2}, projection_dim=12,
        initializer_factor=5.0,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = CLIPModel(shape).eval()
    cut = CLIPImageProcessorPil(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    return model, cut, texts


def llava(seed: int = 0) -> tuple[Any, ...]:
    """A tiny LLaVA (CLIP's vision tower, Llama's language model) and its processor: four tokens an image."""
    said = ["which", "colour", "name", "it", "red", "blue", "deep", "light"]
    words = ["[PAD]", "[UNK]", "<s>", "</s>", "<image>", *said]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 2)])
    texts = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="[PAD]", unk_token="[UNK]", bos_token="<s>", eos_token="</s>",
        additional_special_tokens=["<image>"], model_max_length=40,
    )  # fmt: skip
    special = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "initializer_range": 0.2}
    language = {**SHAPE, **special, "max_position_embeddings": 40, "num_key_value_heads": 2}
    shape = LlavaConfig(
        vision_config=CLIPVisionConfig(**PATCHES, initializer_range=0.2, initializer_factor=5.0),
        text_config=LlamaConfig(**language, vocab_size=len(words)), image_token_id=4,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(shape).eval()
    cut = CLIPImageProcessorPil(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    processor = LlavaProcessor(
        cut, texts, patch_size=4, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )
    return model, processor


IMAGE_MODELS: dict[str, Any] = {"vit": vit, "clip": clip, "llava": llava}


def save_questions(folder: Path, count: int = 30) -> Path:
    """A table of red and blue images, a question about each, and its answer."""
    save_images(folder / "pictures", count)
    path = folder / "questions.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "question", "answer", "tint"])
        for i in range(2 * count):
            colour = ("red", "blue")[i % 2]
            tone = ("deep", "light")[i // 2 % 2]
            asked = ("which colour", "name it", "which colour name")[i % 3]
            writer.writerow([f"pictures/{colour}/{i // 2}.png", asked, f"{tone} {colour}", colour])
    return path


def save_images(folder: Path, count: int = 12, seed: int = 0) -> Path:
    """An image folder in the layout of `datasets`: red and blue noise, PNG files, one folder a class."""
    rng = np.random.default_rng(seed)
    for channel, name in ((0, "red"), (2, "blue")):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            pixels = rng.integers(0, 90, (10 + i % 3, 12, 3), dtype=np.uint8)
            pixels[..., channel] += 150
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    return folder
