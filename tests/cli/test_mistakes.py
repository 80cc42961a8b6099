"""Every mistake of a user's is one line and exit code 2, and leaves nothing behind."""

from pathlib import Path

import pytest
import safetensors.torch

from cli.conftest import FAST
from fedtri.storage import run_directory


def table(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--set", "roudns=3"], "--set roudns: unknown key; did you mean rounds?"),
        (["--set", "rounds=many"], "--set rounds: expected a whole number, got 'many'"),
        (["--set", "rounds"], "--set rounds: expected key=value, such as rounds=3"),
        (
            ["--clients", "many"],
            "Invalid value for '--clients': 'many' is not a valid integer; see `fedtri run --help`",
        ),
        (["--nope"], "No such option '--nope'"),
        (["--method", "ce-lora"], "method: unknown method 'ce-lora'; did you mean ce_lora?"),
        (["--method", "zzz"], "method: unknown method 'zzz'; expected one of local, "),
        (["--set", "method_options.temp=1"], "method_options.temp of ce_lora: unknown key; did you mean temperature?"),
        (
            ["--set", "method_options.temperature=hot"],
            "method_options.temperature of ce_lora: expected a number, got 'hot'",
        ),
        (["--set", "targets=nope"], "targets: no linear layer is called 'nope'; candidates: dense, key, query, value"),
        (["--set", "rank=17"], "rank: 17 is larger than layer bert.encoder.layer.0.attention.self.query (16 x 16)"),
        (["--set", "device=cuda:99"], "device: 'cuda:99' cannot be used here: "),
        (["--clients", "1000"], "clients: expected at most the 120 examples of topics, got 1000"),
        (
            ["--set", "partition=pathological:9"],
            'partition "pathological:9": expected a number from 1 to the 3 classes',
        ),
        (
            ["--set", "partition=zzz"],
            'partition: expected "iid", "dirichlet:0.3", "pathological:2" or "natural:COLUMN"',
        ),
        (["--set", "partition=natural:topic"], 'clients: column "topic" holds 3 clients, got 4; leave clients out'),
        (["--set", "columns.label=nope"], 'topics.csv: no column "nope", found sentence, topic; name the right one'),
        (["--set", "split.test=0.3"], "--set split.test: expected train + validation + test to be 1"),
        (["--set", "init_adapter=nope"], "init_adapter: nope is not a PEFT adapter folder"),
        (["--set", "wire.norm_bound=1e-9"], "round 1: no reply can be used; "),
    ],
)
def test_a_mistake_is_one_line_and_the_same_out_can_be_tried_again(refused, command, tiny, tmp_path, args, message):
    clients = ["--clients", "4"]
    assert message in refused("run", *tiny, *clients, *args, "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "data.csv: the file is empty, expected examples"),
        ("text,label\n", "data.csv: holds no examples"),
        ("a,b\n1,2\n", 'data.csv: no column "text", found a, b; name the right one with columns.text'),
        ("text,label\na,x\nb,x\nc,y\n", "data.csv: column \"label\" holds the label 'y' once"),
        ("text,label\na,x\nb,x\nc,y\nd,y\n", "left one of 3 clients with fewer than 2 of 4 examples"),
    ],
)
def test_data_that_cannot_be_used(refused, lab, tmp_path, text, message):
    data = table(tmp_path / "data.csv", text)
    assert message in refused("run", "--model", lab.model(), "--data", data, *FAST, "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_data_that_is_not_there(refused, tiny, tmp_path):
    assert "no such file or folder" in refused("run", *tiny, "--data", tmp_path / "no.csv")


def without(model: Path, copy: Path, **changes: bytes | None) -> Path:
    """A copy of a model folder with files (. written as _) changed or left out."""
    copy.mkdir()
    for path in model.iterdir():
        content = changes.get(path.name.replace(".", "_"), path.read_bytes())
        if content is not None:
            (copy / path.name).write_bytes(content)
    return copy


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"config_json": None}, "is not a model folder: expected a config.json in it"),
        ({"config_json": b"{"}, "has no configuration that can be read: "),
        ({"config_json": b"{}"}, "has no configuration that can be read: "),
        ({"model_safetensors": None}, "cannot be loaded as a text classifier: "),
        ({"model_safetensors": b"short"}, "cannot be loaded as a text classifier: "),
        ({"tokenizer_json": None, "tokenizer_config_json": None}, "has no vocabulary"),
    ],
)
def test_a_folder_that_is_no_whole_model(refused, lab, tiny, tmp_path, changes, message):
    model = without(lab.model(), tmp_path / "model", **changes)
    assert message in refused("run", *tiny, "--model", model, "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_model_that_lacks_weights_of_its_backbone(refused, lab, tiny, tmp_path):
    model = without(lab.model(), tmp_path / "model")
    tensors = safetensors.torch.load_file(model / "model.safetensors")
    del tensors["bert.encoder.layer.1.attention.self.query.weight"]
    safetensors.torch.save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    assert "has no weights for bert.encoder.layer.1" in refused("run", *tiny, "--model", model)


def test_a_folder_in_use_or_with_something_in_it(refused, tiny, finished, tmp_path):
    with run_directory.locked(finished):
        assert "is in use by a running run" in refused("run", *tiny, "--out", finished)
        assert "is in use by a running run" in refused("resume", finished)
    assert "holds a run; continue it with `fedtri resume" in refused("run", *tiny, "--out", finished)
    assert "the run is finished" in refused("resume", finished)
    mine = tmp_path / "mine"
    mine.mkdir()
    table(mine / "notes.txt", "mine")
    assert "is not empty (notes.txt is there)" in refused("run", *tiny, "--out", mine)
    assert [path.name for path in mine.iterdir()] == ["notes.txt"]


def test_what_is_asked_of_a_folder_that_holds_no_run(refused, tmp_path):
    for args in (["resume"], ["show"], ["predict", "--client", "a", "text"], ["export", "--client", "a", "--to", "b"]):
        name, *rest = args
        assert "is not a run directory: expected a config.toml in it" in refused(name, tmp_path, *rest)


def test_a_client_that_is_not_there_and_a_text_that_says_nothing(refused, finished, tmp_path):
    said = "has no client 'nope', expected one of client-00, client-01, client-02"
    assert said in refused("predict", finished, "--client", "nope", "text")
    assert said in refused("export", finished, "--client", "nope", "--to", tmp_path / "to")
    assert "text 2 is empty" in refused("predict", finished, "--client", "client-00", "a", " ")
    assert "Missing option '--client'" in refused("predict", finished, "text")
