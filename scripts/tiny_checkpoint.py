"""Small checkpoints trained from real data in minutes, to run the configurations of experiments/ without downloads.

    python scripts/tiny_checkpoint.py clip-digits tiny
    fedtri run experiments/clip-digits.toml --set model=tiny

`tiny` is a folder like any model's; it holds weights, tokenizer and processor.
"""

import time
import tomllib
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from torch.nn.functional import cross_entropy
from transformers import CLIPConfig, CLIPModel, CLIPProcessor, CLIPTokenizer
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
