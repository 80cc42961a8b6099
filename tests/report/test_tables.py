"""Comparisons: hand-sized numbers, Student's interval, and never a bare better."""

import math

import numpy as np
import pytest
from scipy import stats

from fedtri.errors import FedtriError
from fedtri.report import page, reading, tables
from report import synthetic


def runs(folder, methods, seeds, **config):
    return [
        reading.load(synthetic.write(folder / f"{m}-{s}-{config}", m, seed=s, clients=4, rounds=3, **config))
        for m in methods
        for s in seeds
    ]


def test_the_interval_is_students(tmp_path):
    groups = tables.grouped(runs(tmp_path, ["local", "ce_lora"], [0, 1, 2]))
    gap = tables.paired(groups[1], groups[0])
    own, other = (np.array(list(g.over_seeds("mean").values())) for g in (groups[1], groups[0]))
    low, high = stats.ttest_rel(own, other).confidence_interval(0.95)
    assert (gap.mean, gap.low, gap.high) == pytest.approx(((own - other).mean(), low, high))
    assert gap.seeds == 3


def test_one_seed_has_no_interval_and_says_so(tmp_path):
    found = runs(tmp_path, ["local", "ce_lora"], [0])
    groups = tables.grouped(found)
    assert math.isnan(tables.paired(groups[1], groups[0]).low)
    assert math.isnan(groups[0].std("mean"))
    assert "one seed" in tables.readable(groups)["less Local only"][1]
    assert "no interval" in tables.caption(groups)
    assert "there is no interval" in page.verdict(groups)


def test_seeds_are_paired_and_others_left_out(tmp_path):
    found = runs(tmp_path, ["local"], [0, 1]) + runs(tmp_path, ["ce_lora"], [1, 2])
    groups = tables.grouped(found)
    assert tables.paired(groups[1], groups[0]).seeds == 1


def test_columns_and_grid_points(tmp_path):
    found = runs(tmp_path, ["local", "ce_lora"], [0, 1], rank=4) + runs(tmp_path, ["local", "ce_lora"], [0, 1], rank=8)
    groups = tables.grouped(found)
    frame = tables.frame(groups, ["rank"])
    assert tuple(frame.columns) == (*tables.COLUMNS, "rank")
    assert frame["seeds"].tolist() == [2] * 4
    assert sorted(zip(frame["method"], frame["rank"], strict=True)) == [
        ("ce_lora", 4), ("ce_lora", 8), ("local", 4), ("local", 8),
    ]  # fmt: skip
    for group, other in zip(groups, tables.baselines(groups, "local"), strict=True):
        assert other is not None
        assert other.point == group.point


def test_a_methods_own_options_split_only_its_own_runs(tmp_path):
    found = runs(tmp_path, ["local"], [0]) + runs(tmp_path, ["ce_lora"], [0], method_options={"top_k": 2})
    assert [g.label for g in tables.grouped(found)] == ["Local only", "CE-LoRA"]
    found += runs(tmp_path, ["ce_lora"], [0], method_options={"top_k": 3})
    assert "CE-LoRA (method_options.top_k 3)" in [g.label for g in tables.grouped(found)]


def test_the_same_run_twice_is_kept_apart(tmp_path):
    a = synthetic.write(tmp_path / "a", "local")
    b = synthetic.write(tmp_path / "b", "local")
    assert len(tables.grouped([reading.load(a), reading.load(b)])) == 2


def test_an_unknown_baseline_is_one_line(tmp_path):
    with pytest.raises(FedtriError, match="fedit"):
        tables.baselines(tables.grouped(runs(tmp_path, ["local"], [0])), "fedit")


def test_a_baseline_without_the_grids_key_serves_every_point(tmp_path):
    found = runs(tmp_path, ["local"], [0])
    for k in (2, 3):
        found += runs(tmp_path, ["ce_lora"], [0], method_options={"top_k": k})
    groups = tables.grouped(found)
    assert tables.baselines(groups) == [groups[0]] * 3


def test_the_verdict_never_leaves_a_difference_bare(tmp_path):
    found = runs(tmp_path, ["ce_lora", "local"], [0, 1, 2])
    said = page.verdict(tables.grouped(found))  # the baseline itself is highest here: it is set against the next
    assert said.startswith("CE-LoRA has the highest mean accuracy")
    assert "against Local only, 95 % interval" in said
    assert "over 3 seeds" in said


def test_bytes_are_those_of_the_whole_run_and_of_both_ways(tmp_path):
    """Seen to fail with the least as the measure, and with bytes of one way."""
    cheap, dear = runs(tmp_path, ["local", "fedit"], [0])
    groups = tables.grouped([cheap, dear])
    ratio = dear.total_bytes / cheap.total_bytes
    assert ratio > 2
    assert tables.dearest(groups) is groups[1]
    assert tables.readable(groups)["fewer"].tolist() == [f"{ratio:,.0f} times", "–"]
    assert groups[1].mean("bytes_per_client") == dear.total_bytes / 4
    assert tables.dearest(groups[:1]) is None


def test_half_of_the_interval_of_the_mean_is_students(tmp_path):
    (group,) = tables.grouped(runs(tmp_path, ["local"], [0, 1, 2]))
    means = list(group.over_seeds("mean").values())
    low, high = stats.t.interval(0.95, 2, np.mean(means), stats.sem(means))
    assert group.half_interval() == pytest.approx((high - low) / 2)


def test_settings_in_which_only_methods_differ_are_said_once(tmp_path):
    """They name no grid point. Seen to fail with each such method called by its settings."""
    found = runs(tmp_path, ["local"], [0], rank=8) + runs(tmp_path, ["fedit"], [0], rank=4)
    groups = tables.grouped(found)
    assert [group.label for group in groups] == ["Local only", "FedIT"]
    assert "FedIT has settings of its own: rank = 4." in tables.caption(groups)
    assert tables.own_settings(groups[:1]) == ""
