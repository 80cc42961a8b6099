"""`fedtri report` and `fedtri watch` as they are typed."""

import subprocess
import sys

import pytest

from report import synthetic


def fedtri(*words: object) -> subprocess.CompletedProcess[str]:
    code = "from fedtri.cli.main import main; main()"
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, words)], capture_output=True, text=True, timeout=120, check=False
    )


def test_report_of_one_and_of_several(tmp_path):
    for method in ("local", "ce_lora"):
        synthetic.write(tmp_path / "runs" / method, method, clients=3, rounds=3)
    one = fedtri("report", tmp_path / "runs" / "ce_lora")
    assert one.returncode == 0, one.stderr
    assert "CE-LoRA on docstrings" in (tmp_path / "runs" / "ce_lora" / "report.html").read_text()
    both = fedtri("report", tmp_path / "runs", "--out", tmp_path / "both.html", "--baseline", "local")
    assert both.returncode == 0, both.stderr
    assert "2 methods compared" in (tmp_path / "both.html").read_text()


def test_watch_prints_a_finished_run(tmp_path):
    shown = fedtri("watch", synthetic.write(tmp_path / "run", rounds=3))
    assert shown.returncode == 0, shown.stderr
    assert "round 3 of 3, finished" in shown.stdout


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("report", "{}"), "no run directory"),
        (("watch", "{}"), "not a run directory"),
        (("report", "{}/run", "--figures", "{}/f", "--format", "gif"), "expected one of svg, png"),
        (("report", "{}/run", "{}/other", "--baseline", "x"), "--baseline"),
        (("report", "{}/run", "--baseline", "x"), "--baseline"),
        (("compare", "--methods", "nothing"), "unknown method"),
        (("compare", "--methods", "local", "--seeds", "a"), "--seeds"),
        (("run", "--track", "aim"), "--track"),
    ],
)
def test_mistakes_are_one_line(tmp_path, words, said):
    if any("run" in word or "other" in word for word in words):
        synthetic.write(tmp_path / "run", rounds=2, clients=2)
        synthetic.write(tmp_path / "other", "fedit", rounds=2, clients=2)
    if words[:2] == ("report", "{}"):
        tmp_path = tmp_path / "empty"
    done = fedtri(*(word.format(tmp_path) for word in words))
    assert done.returncode == 2
    assert said in done.stderr
    assert done.stderr.count("\n") == 1
