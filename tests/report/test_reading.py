"""A run directory gives a page whatever is missing in it, and the page says what."""

import json

import numpy as np
import pytest

import fedtri
from fedtri.errors import FedtriError
from fedtri.report import figures, page, reading
from report import synthetic


def test_a_whole_run_lacks_nothing(tmp_path):
    run = fedtri.load(synthetic.write(tmp_path / "run", clients=3, rounds=4))
    assert run.missing == []
    assert list(run.rounds.index) == [1, 2, 3, 4]
    assert run.clients == ["client-00", "client-01", "client-02"]
    assert run.by_client("accuracy").shape == (4, 3)
    assert run.per_round("up") == 4 * 768 + 190
    assert run.cumulative_bytes.iloc[-1] == 3 * (4 * (4 * 768 + 190) + 21_000)
    assert run.total_bytes == 3 * (8 * (4 * 768 + 190) + 21_000)
    assert run.parameters_up == 768
    assert "weights-matrix" in figures.of_run(run)


def test_a_line_cut_short_is_left_out_and_said(tmp_path):
    folder = synthetic.write(tmp_path / "run", rounds=4, finished=False)
    path = folder / "rounds.jsonl"
    path.write_text(path.read_text()[:-300])
    run = reading.load(folder)
    assert len(run.lines) == 3
    assert any("the last line is cut short" in text for text in run.missing)
    assert any("not finished: 3 of 4 rounds" in text for text in run.missing)
    assert "the last line is cut short" in page.of_run(run)


def test_keys_missing_and_nan_are_said_and_drawn_around(tmp_path):
    folder = synthetic.write(tmp_path / "run", clients=3, rounds=5)
    lines = reading.load(folder).lines
    changed = [dict(line) for line in lines]
    del changed[0]["accuracy_local"], changed[1]["seconds"], changed[2]["similarity"]
    changed[1]["loss"] = float("nan")
    changed[3]["accuracy"] = {"mean": float("nan"), "worst": 0.1, "best": 0.2, "clients": {"client-00": float("inf")}}
    (folder / "rounds.jsonl").write_text("".join(json.dumps(line) + "\n" for line in changed))
    run = reading.load(folder)
    told = " ".join(run.missing)
    assert "accuracy_local is missing in round 1." in told
    assert "seconds is missing in round 2." in told
    assert "loss is not a finite number in round 2" in told
    assert "accuracy is not a finite number in round 4" in told
    text = page.of_run(run)
    assert "NaN" not in text.split("plotly.js v")[0]
    assert np.isfinite(list(run.latest("accuracy").values())).all()


@pytest.mark.parametrize(
    "spoil",
    [
        lambda folder: (folder / "rounds.jsonl").unlink(),
        lambda folder: (folder / "rounds.jsonl").write_text('[1]\n{"round": "x"}\nnull\n'),
        lambda folder: (folder / "rounds.jsonl").write_text('{"round": 1}\n'),
        lambda folder: (folder / "rounds.jsonl").write_text('{"round": 1, "accuracy": 3, "bytes": [], "clients": 4}\n'),
        lambda folder: (folder / "rounds.jsonl").write_text(
            '{"round": 1, "similarity": {"clients": ["a"], "data": 5}}\n'
        ),
        lambda folder: (folder / "summary.json").write_text('{"rounds": 3'),
        lambda folder: (folder / "summary.json").write_text("{}"),
        lambda folder: (folder / "summary.json").write_text(
            '{"method": "x", "client_table": {"a": {}}, "labels": null}'
        ),
        lambda folder: (folder / "config.toml").write_text("= ["),
        lambda folder: (folder / "environment.json").unlink(),
    ],
)
def test_nothing_missing_stops_the_page(tmp_path, spoil):
    folder = synthetic.write(tmp_path / "run", clients=2, rounds=2)
    spoil(folder)
    run = reading.load(folder)
    assert run.missing
    assert "What is missing" in page.of_run(run)
    other = reading.load(synthetic.write(tmp_path / "other", "fedit", clients=2, rounds=2))
    assert "What is missing" in page.of_runs([run, other])


def test_a_folder_without_a_run_is_one_line(tmp_path):
    with pytest.raises(FedtriError, match="no run directory"):
        reading.find([tmp_path])
    with pytest.raises(FedtriError, match=r"config\.toml"):
        reading.load(tmp_path)


def test_adapters_come_on_demand(tmp_path):
    run = reading.load(synthetic.write(tmp_path / "run"))
    with pytest.raises(FedtriError, match="none yet"):
        run.adapter("client-00")
