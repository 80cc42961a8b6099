"""A finished run's models scored again: on their own test data and by the harness; what a serving engine takes."""

import json
import re
from functools import partial

import pytest
from typer.testing import CliRunner

from fedtri.cli.main import application
from fedtri.errors import FedtriError
from fedtri.runs import finished, lifecycle, vllm
from fedtri.storage import run_directory
from tiny import LABELS


@pytest.fixture(scope="module")
def spoken(lab, tmp_path_factory):
    """A finished run of a language model."""
    folder = tmp_path_factory.mktemp("spoken") / "run"
    list(lifecycle.run(lab.language(out=str(folder), rounds=1, clients=2, learning_rate=2e-2)))
    return folder


def test_the_metrics_again_are_those_of_the_run(spoken):
    found = finished.evaluate(spoken)
    line = run_directory.read_rounds(spoken)[-1]
    assert set(found) == set(line["accuracy"]["clients"])
    for client, scores in found.items():
        assert scores["accuracy"] == line["accuracy"]["clients"][client]
        assert scores["loss"] == line["test_loss"]["clients"][client]
        assert scores["perplexity"] == line["metrics"]["perplexity"]["clients"][client]
    assert finished.evaluate(spoken, "client-01") == {"client-01": found["client-01"]}


def test_the_command_prints_a_row_a_client(spoken):
    shown = CliRunner().invoke(application(), ["evaluate", str(spoken)])
    assert shown.exit_code == 0, shown.output
    assert all(f"client-0{i}" in shown.output for i in range(2))
    assert "perplexity" in shown.output


def test_an_unknown_client_is_one_line(spoken):
    with pytest.raises(FedtriError, match="has no client 'x', expected one of client-00, client-01"):
        finished.evaluate(spoken, "x")


TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{prompt}}}}"
doc_to_choice: {choices}
doc_to_target: "{{{{topic}}}}"
metric_list:
  - metric: acc
{more}
"""


@pytest.fixture
def harness_tasks(lab, tmp_path):
    """A folder with tasks of the harness's own kind on the lab's dialogues."""
    for name, more in (("topics", ""), ("runs_code", "unsafe_code: true")):
        text = TASK.format(name=name, data=lab.folder / "dialogues.jsonl", choices=list(LABELS), more=more)
        (tmp_path / f"{name}.yaml").write_text(text)
    return tmp_path


def test_the_harness_asks_the_clients_own_model(spoken, harness_tasks, monkeypatch):
    """By the command line, on four examples of a task in the harness's own format."""
    arguments = ["evaluate", str(spoken), "--tasks", "topics", "--include", str(harness_tasks), "--limit", "4"]
    monkeypatch.setenv("COLUMNS", "200")
    shown = CliRunner().invoke(application(), arguments)
    assert shown.exit_code == 0, shown.output
    assert "client-00" in shown.output
    value = re.search(r"topics\s+([\d.]+)", shown.output)
    assert value is not None
    assert float(value[1]) in (0, 0.25, 0.5, 0.75, 1)


@pytest.fixture
def _no_other_tasks(monkeypatch):
    """The harness reads the thousands of tasks that come with it each time it is asked, which takes ten seconds."""
    given = pytest.importorskip("lm_eval.tasks").TaskManager
    monkeypatch.setattr("lm_eval.tasks.TaskManager", partial(given, include_defaults=False))


@pytest.mark.usefixtures("_no_other_tasks")
def test_generated_code_runs_only_where_the_harness_is_told_so(spoken, harness_tasks, monkeypatch):
    """Seen to fail with confirm_run_unsafe_code always true."""
    monkeypatch.delenv("HF_ALLOW_CODE_EVAL", raising=False)
    with pytest.raises(FedtriError, match=r"would run code that the model writes; .* set HF_ALLOW_CODE_EVAL=1"):
        finished.evaluate_elsewhere(spoken, "client-00", ["runs_code"], limit=2, include=harness_tasks)
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "1")
    found = finished.evaluate_elsewhere(spoken, "client-00", ["runs_code"], limit=2, include=harness_tasks)
    assert found["runs_code"]


@pytest.mark.usefixtures("_no_other_tasks")
def test_what_the_harness_does_not_know_is_one_line(spoken):
    with pytest.raises(FedtriError, match="the harness has no task 'no_such_task'"):
        finished.evaluate_elsewhere(spoken, "client-00", ["no_such_task"])


def test_the_harness_asks_language_models_alone(lab, tmp_path):
    list(lifecycle.run(lab.config(out=str(tmp_path / "run"), rounds=1, steps=1)))
    with pytest.raises(FedtriError, match="asks causal language models, this run is text_classification"):
        finished.evaluate_elsewhere(tmp_path / "run", "client-00", ["gsm8k"])


def test_an_adapter_that_vllm_takes_comes_with_the_command_that_serves_it(spoken, tmp_path):
    arguments = ["export", str(spoken), "--client", "client-00", "--to", str(tmp_path / "a"), "--for", "vllm"]
    shown = CliRunner().invoke(application(), arguments)
    assert shown.exit_code == 0, shown.output
    assert "--enable-lora --max-lora-rank 8 --lora-modules a=" in shown.output


def test_one_that_it_does_not_take_is_refused_and_leaves_nothing(lab, tmp_path):
    list(lifecycle.run(lab.config(out=str(tmp_path / "run"), rounds=1, steps=1)))
    with pytest.raises(FedtriError, match='--for vllm: vLLM takes task_type = "CAUSAL_LM", this adapter has "SEQ_CLS"'):
        finished.export(tmp_path / "run", "client-00", tmp_path / "a", engine="vllm")
    assert not (tmp_path / "a").exists()
    with pytest.raises(FedtriError, match="--for: expected vllm, got 'tgi'"):
        finished.export(tmp_path / "run", "client-00", tmp_path / "a", engine="tgi")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_dora": True}, "vLLM takes use_dora = false, this adapter has true"),
        ({"bias": "all"}, 'vLLM takes bias = "none", this adapter has "all"'),
        ({"modules_to_save": ["lm_head"]}, r'vLLM takes modules_to_save = null, this adapter has \["lm_head"\]'),
        ({"r": 1024}, "vLLM takes a rank up to 512, this adapter has 1024"),
        ({"peft_type": "HIRA"}, 'vLLM takes peft_type = "LORA"'),
    ],
)
def test_what_vllm_does_not_take(change, message, spoken, tmp_path):
    finished.export(spoken, "client-00", tmp_path / "a")
    path = tmp_path / "a" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(FedtriError, match=message):
        vllm.check_vllm(tmp_path / "a")
