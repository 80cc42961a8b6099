"""Small checkpoints trained from real data in minutes, to run the configurations of experiments/ without downloads.

    python scripts/tiny_checkpoint.py clip-digits tiny
    fedtri run experiments/clip-digits.toml --set model=tiny

    python scripts/tiny_checkpoint.py gsm8k tiny --data path/to/gsm8k
    fedtri run experiments/gsm8k.toml --set model=tiny --data path/to/gsm8k

`tiny` is a folder like any model's; it holds weights, tokenizer and processor.
"""

import os

os.environ.setdefault("GOMP_SPINCOUNT", "2000")  # as the command line does, before PyTorch is imported

import json
import time
import tomllib
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from tokenizers import ByteLevelBPETokenizer
from torch.nn.functional import cross_entropy
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPProcessor,
    CLIPTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    get_scheduler,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from fedtri.data import load_pool
from fedtri.tasks.images import pixels_of, pool

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
Out = Annotated[Path, typer.Argument(help="The folder to write; must not exist.")]
app = typer.Typer(add_completion=False, help=__doc__)


@app.callback()
def tiny_checkpoint() -> None:
    """Small checkpoints trained from real data in minutes."""


@app.command()
def clip_digits(out: Out, steps: int = 250, known: int = 5) -> None:
    """A CLIP of 0.3 million weights that has seen the digits 0 to 4 (all below `known`) of scikit-learn's."""
    _new(out)
    prompt = tomllib.loads((EXPERIMENTS / "clip-digits.toml").read_text())["task_options"]["prompt"]
    torch.manual_seed(0)
    processor = CLIPProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8}), byte_tokenizer()
    )
    model = CLIPModel(clip_config(processor.tokenizer))
    found = load_pool("digits", pool)
    assert found.labels is not None
    chosen = np.flatnonzero(found.labels < known)
    pixels = pixels_of([found.table["image"][int(row)] for row in chosen], processor.image_processor)
    labels = torch.from_numpy(found.labels[chosen])
    texts = processor.tokenizer(
        [prompt.format(name) for name in found.label_names[:known]], padding=True, return_tensors="pt"
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    rng, began = np.random.default_rng(0), time.perf_counter()
    for step in range(1, steps + 1):
        rows = rng.integers(len(chosen), size=64)
        logits = model(**texts, pixel_values=pixels.batch(rows)).logits_per_image
        loss = cross_entropy(logits, labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            right = float((logits.argmax(1) == labels[rows]).float().mean())
            typer.echo(f"step {step}: loss {loss:.3f}, accuracy {right:.3f}, {time.perf_counter() - began:.0f} s")
    model.save_pretrained(out)
    processor.save_pretrained(out)
    typer.echo(f"wrote {out}; now: fedtri run experiments/clip-digits.toml --set model={out}")


@app.command()
def gsm8k(
    out: Out,
    data: Annotated[Path, typer.Option(help="GSM8K's folder, with train.jsonl.")],
    steps: int = 400,
) -> None:
    """A Llama of 0.9 million weights that has read GSM8K's training questions, and none of its answers."""
    _new(out)
    rows = [json.loads(line) for line in (data / "train.jsonl").read_text().splitlines()]
    words = ByteLevelBPETokenizer()
    texts = (row[part] for row in rows for part in ("question", "answer"))
    words.train_from_iterator(texts, vocab_size=2048, special_tokens=["<s>", "</s>"], show_progress=False)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words._tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>", model_max_length=512
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(llama_config(tokenizer))
    text = [id for row in rows for id in [*tokenizer(row["question"])["input_ids"], tokenizer.eos_token_id]]
    windows = torch.tensor(text[: len(text) // 64 * 64]).view(-1, 64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    schedule = get_scheduler("cosine", optimizer, steps // 20, steps)
    began = time.perf_counter()
    for step in range(1, steps + 1):
        batch = windows[torch.randint(len(windows), (16,))]
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            typer.echo(f"step {step}: loss {loss.item():.3f}, {time.perf_counter() - began:.0f} s")
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    typer.echo(f"wrote {out}; now: fedtri run experiments/gsm8k.toml --set model={out} --data {data}")


def llama_config(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    """Four layers of 128, input and output embeddings the same."""
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    return LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=512, tie_word_embeddings=True, **special,
    )  # fmt: skip


def clip_config(tokenizer: CLIPTokenizer) -> CLIPConfig:
    """Towers of 64, three layers each; images of 8 x 8 in patches of 2."""
    tower = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    return CLIPConfig(
        text_config={**tower, **special, "vocab_size": len(tokenizer), "max_position_embeddings": 77},
        vision_config={**tower, "image_size": 8, "patch_size": 2},
        projection_dim=32,
    )


def byte_tokenizer() -> CLIPTokenizer:
    """CLIP's own tokenizer without its merges: a token for each byte, and one for each at the end of a word."""
    letters = list(bytes_to_unicode().values())
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={word: place for place, word in enumerate(words)}, merges=[], model_max_length=77)


def _new(out: Path) -> None:
    if out.exists():
        typer.echo(f"{out} exists already, expected a new folder", err=True)
        raise typer.Exit(2)


if __name__ == "__main__":
    app()
