"""Comparisons: what runs, what is kept, what is resumed, what is refused. The models are tiny."""

import csv
import json
import math

import pytest
import tomli_w

from fedtri.errors import FedtriError
from fedtri.runs import compare, footing, lifecycle
from tiny import DEFAULTS


@pytest.fixture(scope="module")
def config(lab, tmp_path_factory):
    path = tmp_path_factory.mktemp("compare") / "tiny.toml"
    path.write_text(
        tomli_w.dumps(DEFAULTS | {"clients": 3, "steps": 1, "model": str(lab.model()), "data": str(lab.data)})
    )
    return path


def finished(steps):
    """The names of the runs that were run, and of those found finished."""
    ran, kept = [], []
    for step in steps:
        if step.line is None:
            (kept if step.kept else ran).append(step.member.name)
    return ran, kept


def test_a_comparison_from_beginning_to_end(config, tmp_path):
    plan = compare.plan(config, ["local", "fedit", "ce_lora"], seeds=[0, 1], out=tmp_path / "out")
    ran, kept = finished(compare.run(plan))
    assert (len(ran), kept) == (6, [])
    rows = list(csv.DictReader((tmp_path / "out" / "table.csv").open()))
    assert list(rows[0]) == [
        "method", "data", "partition", "seeds", "accuracy_mean", "accuracy_std", "worst_mean", "best_mean",
        "bytes_up_per_client_round", "bytes_per_client", "bytes_total", "seconds",
    ]  # fmt: skip
    assert [row["method"] for row in rows] == ["local", "fedit", "ce_lora"]
    assert {row["seeds"] for row in rows} == {"2"}
    summaries = [json.loads((tmp_path / f"out/fedit-seed{s}/summary.json").read_text()) for s in (0, 1)]
    mean = sum(s["accuracy"]["mean"] for s in summaries) / 2
    assert float(rows[1]["accuracy_mean"]) == pytest.approx(mean)
    assert "| FedIT | 2 |" in (tmp_path / "out" / "table.md").read_text()
    assert "3 methods compared" in (tmp_path / "out" / "report.html").read_text()
    assert finished(compare.run(plan)) == ([], ran)


def test_methods_share_data_and_head(config, tmp_path):
    plan = compare.plan(config, ["fedit", "ce_lora"], out=tmp_path / "out")
    assert {member.config.head for member in plan.members} == {"personal"}
    finished(compare.run(plan))
    tables = [
        json.loads((tmp_path / "out" / member.name / "summary.json").read_text())["client_table"]
        for member in plan.members
    ]
    assert tables[0] == tables[1]
    lines = [json.loads((tmp_path / "out" / m.name / "rounds.jsonl").read_text().splitlines()[0]) for m in plan.members]
    # the same A, head and batches: before anything is aggregated, both have learned nearly the same with B alone moving
    assert lines[0]["loss"] == pytest.approx(lines[1]["loss"], abs=0.05)


def test_killed_half_way_and_called_again(config, tmp_path, monkeypatch):
    plan = compare.plan(config, ["local", "fedit", "ce_lora"], out=tmp_path / "out")
    steps = compare.run(plan)
    for step in steps:
        if step.member.name == "fedit-seed0" and step.line is not None:
            break  # in the middle of the second run: one round of two is on disk
    steps.close()
    assert not (tmp_path / "out" / "fedit-seed0" / "summary.json").exists()
    before = (tmp_path / "out" / "local-seed0" / "summary.json").stat().st_mtime_ns
    resumed = []
    real = lifecycle.resume
    monkeypatch.setattr(lifecycle, "resume", lambda folder, *more: resumed.append(folder.name) or real(folder, *more))
    ran, kept = finished(compare.run(plan))
    assert kept == ["local-seed0"]
    assert ran == ["fedit-seed0", "ce_lora-seed0"]
    assert resumed == ["fedit-seed0"]
    assert (tmp_path / "out" / "local-seed0" / "summary.json").stat().st_mtime_ns == before


def test_a_second_call_at_once_is_refused(config, tmp_path):
    plan = compare.plan(config, ["local"], out=tmp_path / "out")
    first = compare.run(plan)
    next(first)
    with pytest.raises(FedtriError, match="in use") as refused:
        next(compare.run(plan))
    assert "\n" not in str(refused.value)
    first.close()


def test_a_run_killed_while_it_was_set_up_is_run_anew(config, tmp_path):
    plan = compare.plan(config, ["local"], out=tmp_path / "out")
    compare.run(plan).close()
    (tmp_path / "out" / "local-seed0" / "clients").mkdir(parents=True)
    (tmp_path / "out" / "compare.json").write_text("{}")
    assert finished(compare.run(plan)) == (["local-seed0"], [])


def test_the_grid_and_its_keys(config, tmp_path):
    grid = dict([compare.parse_grid("rank=2,3"), compare.parse_grid("method_options.top_k=1,2")])
    plan = compare.plan(config, ["local", "ce_lora"], grid=grid, out=tmp_path / "out")
    assert [member.name for member in plan.members] == [
        "local-rank=2-seed0", "ce_lora-rank=2-top_k=1-seed0", "ce_lora-rank=2-top_k=2-seed0",
        "local-rank=3-seed0", "ce_lora-rank=3-top_k=1-seed0", "ce_lora-rank=3-top_k=2-seed0",
    ]  # fmt: skip
    finished(compare.run(plan))
    rows = list(csv.DictReader((tmp_path / "out" / "table.csv").open()))
    assert [(row["method"], row["rank"], row["method_options.top_k"]) for row in rows] == [
        ("local", "2", ""), ("ce_lora", "2", "1"), ("ce_lora", "2", "2"),
        ("local", "3", ""), ("ce_lora", "3", "1"), ("ce_lora", "3", "2"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("names", "more", "said"),
    [
        ([], {}, "--methods"),
        (["lora"], {}, "unknown method 'lora'"),
        (["local"], {"baseline": "fedit"}, "--baseline"),
        (["local"], {"grid": {"rnk": [2]}}, "rnk"),
        (["ce_lora"], {"grid": {"method_options.top_k": [0]}}, "top_k"),
    ],
)
def test_mistakes_are_found_before_anything_runs(config, tmp_path, names, more, said):
    with pytest.raises(FedtriError, match=said):
        compare.plan(config, names, out=tmp_path / "out", **more)


def test_a_folder_with_something_else_is_left_alone(config, tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(FedtriError, match=r"thesis\.tex"):
        next(compare.run(compare.plan(config, ["local"], out=tmp_path)))


def test_other_settings_in_the_same_folder_are_refused(config, tmp_path):
    finished(compare.run(compare.plan(config, ["local"], out=tmp_path / "out")))
    with pytest.raises(FedtriError, match="rank = 3, asked for is 2"):
        finished(compare.run(compare.plan(config, ["local"], out=tmp_path / "out", settings=["rank=2"])))


@pytest.mark.parametrize("text", ["rank", "rank=", "=4", "rank=4,,8"])
def test_a_grid_that_is_none(text):
    with pytest.raises(FedtriError, match="expected key=value"):
        compare.parse_grid(text)


def test_a_method_runs_with_the_settings_of_its_own_table(config, tmp_path):
    path = tmp_path / "own.toml"
    path.write_text(config.read_text() + "\n[methods.fed_sb]\nrank = 4\nlearning_rate = 0.02\n")
    fedit, fed_sb = compare.plan(path, ["fedit", "fed_sb"], out=tmp_path / "out").members
    assert (fedit.config.rank, fedit.config.learning_rate) == (3, 5e-3)
    assert (fed_sb.config.rank, fed_sb.config.learning_rate) == (4, 0.02)


def test_every_method_is_checked_before_anything_runs(config, tmp_path):
    """RAVAN's four heads need a rank they divide. Seen to fail without the Specs of all members."""
    with pytest.raises(FedtriError, match=r"^ravan-seed0: rank: expected a multiple of .*heads \(4\), got 3$"):
        compare.plan(config, ["fedit", "ravan"], out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_rates_are_tuned_on_validation_alike_for_all(config, tmp_path):
    """Three multiples each, as many rounds; the comparison runs at the best."""
    plan = compare.plan(config, ["local", "fedit"], seeds=[1, 0], out=tmp_path / "out", tune=True, tune_rounds=1)
    ran, _ = finished(compare.run(plan))
    assert ran == [
        *(f"{name}-rate-x{factor}" for name in ("local", "fedit") for factor in ("0.3", "1", "3")),
        "local-seed1", "local-seed0", "fedit-seed1", "fedit-seed0",
    ]  # fmt: skip
    said = json.loads((tmp_path / "out" / "compare.json").read_text())["tuning"]
    assert said["rounds"] == 1
    for name in ("local", "fedit"):
        losses = {}
        for factor in (0.3, 1.0, 3.0):
            folder = tmp_path / f"out/tuning/{name}-rate-x{factor:g}"
            (line,) = map(json.loads, (folder / "rounds.jsonl").read_text().splitlines())
            losses[factor] = line["validation_loss"]
            assert "\nseed = 1\n" in (folder / "config.toml").read_text()
        assert said["chosen"][name] == min(losses, key=losses.__getitem__)
        rate = float(f"{5e-3 * said['chosen'][name]:.3g}")
        assert f"\nlearning_rate = {rate}\n" in (tmp_path / f"out/{name}-seed0/config.toml").read_text()
    assert "Learning rates were tuned" in (tmp_path / "out" / "table.md").read_text()
    assert finished(compare.run(plan))[0] == []


@pytest.mark.parametrize("equal", ["bytes", "parameters"])
def test_ranks_make_bytes_or_parameters_equal(equal, config, tmp_path):
    """Fed-SB's r² against FedIT's 3 (d_in + d_out) for each layer."""
    fedit, fed_sb = compare.plan(config, ["fedit", "fed_sb"], out=tmp_path / "out", footing=equal).members
    specs = footing.Specs()
    own, other = (footing.size(specs.of(member.config), equal) for member in (fed_sb, fedit))
    nearer = [fed_sb.config.model_copy(update={"rank": fed_sb.config.rank + step}) for step in (-1, 1)]
    for one in nearer:
        try:
            size = footing.size(specs.of(one), equal)
        except FedtriError:
            continue
        assert abs(math.log(own / other)) <= abs(math.log(size / other))
    assert fed_sb.config.rank > fedit.config.rank == 3


def test_equal_rank_refuses_others(config, tmp_path):
    settings = ["methods.fed_sb.rank=4"]
    with pytest.raises(FedtriError, match=r"^--equal rank: fed_sb has rank 4, fedit has 3; "):
        compare.plan(config, ["fedit", "fed_sb"], out=tmp_path / "out", footing="rank", settings=settings)
    with pytest.raises(FedtriError, match=r"^--equal: expected one of rank, parameters, bytes, got 'time'$"):
        compare.plan(config, ["fedit"], out=tmp_path / "out", footing="time")
