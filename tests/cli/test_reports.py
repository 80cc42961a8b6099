"""`fedtri report` and `fedtri watch` as they are typed, and the mistakes made in typing them."""

import pytest

from report import synthetic


def test_report_of_one_and_of_several(command, tmp_path):
    for method in ("local", "ce_lora"):
        synthetic.write(tmp_path / "runs" / method, method, clients=3, rounds=3)
    code, _, error = command("report", tmp_path / "runs" / "ce_lora")
    assert (code, error) == (0, "")
    assert "CE-LoRA on docstrings" in (tmp_path / "runs" / "ce_lora" / "report.html").read_text()
    code, _, error = command("report", tmp_path / "runs", "--out", tmp_path / "both.html", "--baseline", "local")
    assert (code, error) == (0, "")
    assert "2 methods compared" in (tmp_path / "both.html").read_text()


def test_watch_prints_a_finished_run(command, tmp_path):
    code, out, error = command("watch", synthetic.write(tmp_path / "run", rounds=3))
    assert (code, error) == (0, "")
    assert "round 3 of 3, finished" in out


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
def test_mistakes_are_one_line(refused, tmp_path, words, said):
    if any("run" in word or "other" in word for word in words):
        synthetic.write(tmp_path / "run", rounds=2, clients=2)
        synthetic.write(tmp_path / "other", "fedit", rounds=2, clients=2)
    if words[:2] == ("report", "{}"):
        tmp_path = tmp_path / "empty"
    assert said in refused(*(word.format(tmp_path) for word in words))
