"""What experiments/ and scripts/ promise: configurations that are valid, and small checkpoints that they run with."""

from pathlib import Path

import pytest
from transformers import AutoProcessor, CLIPModel
from typer.testing import CliRunner

from fedtri import config, tasks
from fedtri.cli.main import application
from fedtri.runs import lifecycle
from processes import script

ROOT = Path(__file__).parents[1]
EXPERIMENTS = sorted((ROOT / "experiments").glob("*.toml"))


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_every_experiment_is_a_configuration_of_its_task(path):
    loaded = config.load(path)
    assert tasks.build(loaded.task, loaded.task_options).name == loaded.task


@pytest.fixture(scope="module")
def tiny_clip(tmp_path_factory) -> Path:
    """The script's checkpoint after two steps."""
    out = tmp_path_factory.mktemp("tiny") / "tiny"
    for code, said in ((0, "wrote"), (2, "exists already")):
        child = script(
            out.parent / "said", ROOT / "scripts" / "tiny_checkpoint.py", "clip-digits", str(out), "--steps=2"
        )
        assert child.wait() == code
        assert said in child.output.read_text() + child.errors.read_text()
    return out


def test_clip_digits_runs_with_the_small_checkpoint(tiny_clip, tmp_path):
    """All of the embedded digits, and tokens that tell them apart."""
    settings = [f"model={tiny_clip}", "rounds=1", "steps=1", "clients=3", "data_options.limit=60"]
    found = config.load(ROOT / "experiments" / "clip-digits.toml", settings, out=str(tmp_path / "run"))
    (progress,) = lifecycle.run(found)
    assert len(progress.line["accuracy"]["clients"]) == 3
    processor = AutoProcessor.from_pretrained(tiny_clip, backend="pil")
    ids = [processor.tokenizer(found.task_options["prompt"].format(n))["input_ids"] for n in range(10)]
    assert len({tuple(row) for row in ids}) == 10
    assert ids[0][-1] == CLIPModel.from_pretrained(tiny_clip).config.text_config.eos_token_id


def test_start_scores_the_checkpoint_itself(tiny_clip):
    """Mean test loss of clients that have not trained; seen to fail with the factors of a client that has."""
    settings = ["clients=3", "data_options.limit=60", f"model={tiny_clip}", "partition=iid"]
    path = ROOT / "experiments" / "clip-digits.toml"
    found = lifecycle.starting(config.load(path, settings))
    assert len(found) == 3
    assert all(set(scores) == {"loss", "accuracy"} for scores in found.values())
    options = [part for text in settings for part in ("--set", text)]
    said = CliRunner().invoke(application(), ["start", str(path), *options])
    assert said.exit_code == 0
    mean = sum(scores["loss"] for scores in found.values()) / 3
    assert f"{mean:.4f}" in said.output
