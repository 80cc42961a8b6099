"""gsm8k."""

import json
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from tokenizers import ByteLevelBPETokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, get_scheduler

app = typer.Typer(add_completion=False, help=__doc__)
Out = Annotated[Path, typer.Argument(help="The folder to write; must not exist.")]


@app.command()
def gsm8k(
    data: Annotated[Path, typer.Argument(help="GSM8K's folder, with train.jsonl.")],
    out: Out,
    steps: int = 400,
    width: int = 128,
) -> None:
    """A Llama of 0.9 million weights that has read GSM8K's training questions, and none of its answers."""
    rows = [json.loads(line) for line in (data / "train.jsonl").read_text().splitlines()]
    words = ByteLevelBPETokenizer()
    words.train_from_iterator(
        (row[part] for row in rows for part in ("question", "answer")), vocab_size=2048, special_tokens=["<s>", "</s>"],
        show_progress=False,
    )  # fmt: skip
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words._tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>", model_max_length=512
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=4,
            num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=512, tie_word_embeddings=True,
            bos_token_id=0, eos_token_id=1, pad_token_id=1,
        )
    )  # fmt: skip
    text = torch.tensor([id for row in rows for id in [*tokenizer(row["question"])["input_ids"], 1]])
    windows = text[: len(text) // 64 * 64].view(-1, 64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    schedule = get_scheduler("cosine", optimizer, 20, steps)
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
    typer.echo(f"wrote {out}; now: fedtri run experiments/gsm8k.toml --data {data} --set model={out}")


if __name__ == "__main__":
    app()
