"""Laws of the local loop: what a client's step is, whatever shares its pass, and what its evaluation counts."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy

from fedtri.adapters.layout import Key
from fedtri.execution import train
from fedtri.execution.train import Optimization, Work, micro_batches, minibatches
from tiny import assert_same

KINDS = frozenset("ABH")
ROWS = np.arange(100, 123)


def taken(how: Optimization, rows=ROWS, seed: int = 1) -> list[list[int]]:
    return [batch.tolist() for batch in minibatches(Work(0, rows, seed), how)]


def test_an_epoch_is_every_row_once_in_an_order_of_the_seed():
    """Seen to fail with the last, smaller minibatch dropped."""
    how = Optimization(steps=None, epochs=2.0, batch_size=5)
    batches = taken(how)
    assert [len(batch) for batch in batches] == [5, 5, 5, 5, 3] * 2
    for epoch in (batches[:5], batches[5:]):
        assert sorted(row for batch in epoch for row in batch) == ROWS.tolist()
    assert batches[:5] != batches[5:]
    assert batches == taken(how)
    assert batches != taken(how, seed=2)


def test_steps_and_parts_of_an_epoch_cut_it_short():
    whole = taken(Optimization(steps=None, epochs=1.0, batch_size=5))
    assert taken(Optimization(steps=3, batch_size=5)) == whole[:3]
    assert len(taken(Optimization(steps=12, batch_size=5))) == 12
    assert len(taken(Optimization(steps=None, epochs=0.5, batch_size=5))) == 2
    assert len(taken(Optimization(steps=None, epochs=0.01, batch_size=5))) == 1
    assert [len(batch) for batch in taken(Optimization(steps=3, batch_size=64))] == [23, 23, 23]


@given(st.lists(st.integers(1, 50), min_size=1, max_size=60), st.integers(1, 200))
def test_micro_batches_hold_every_position_once_under_the_budget(lengths, budget):
    """Padded to the longest of each; only a text longer than the budget stands alone over it. Seen to fail with the
    budget compared to the sum of lengths, unpadded.
    """
    sizes = np.array(lengths)
    batches = list(micro_batches(sizes, budget))
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * sizes[batch].max() <= budget
    longest = [sizes[batch].max() for batch in batches]
    assert longest == sorted(longest)
    for batch, following in pairwise(batches):  # none could have taken the next one too
        assert (len(batch) + 1) * sizes[following[0]] > budget


@pytest.fixture
def site(lab, tmp_path):
    """Four clients of different sizes in one cohort, in float64, each in its slot with what everyone starts from."""
    site = lab.federation(tmp_path, double=True, method="local", partition="dirichlet:0.5").site
    for slot, client in enumerate(site.splits):
        site.cohort.write(slot, site.initial(client), site.ranks[client], site.alpha)
    return site


def fit(site, slots, how: Optimization, kinds=KINDS, **more) -> dict[int, float]:
    works = [Work(slot, list(site.splits.values())[slot].train, seed=slot) for slot in slots]
    return train.train(site.cohort, site.task, site.examples, works, how, kinds, **more)


def mean_loss(site, slot: int, rows) -> torch.Tensor:
    """The plain mean over rows, in one padded batch."""
    site.cohort.route([slot] * len(rows))
    batch = site.examples.batch(np.array(rows))
    return cross_entropy(site.cohort.model(**{k: v for k, v in batch.items() if k != "labels"}).logits, batch["labels"])


def gradients(site, slot: int, rows) -> list[torch.Tensor]:
    site.cohort.train_only(KINDS)
    mean_loss(site, slot, rows).backward()
    return [view.grad.clone() for view in site.cohort.slices(slot, KINDS).values()]


@pytest.mark.parametrize("clip", [None, 0.1])
def test_a_step_is_adamw_on_the_mean_over_the_clients_own_minibatch(site, clip):
    """Against torch's own AdamW and clipping on a single client; micro-batches of one and four clients beside it.
    Seen to fail with the mean over micro-batches of means, and with one clip for the whole cohort.
    """
    how = Optimization(steps=1, batch_size=7, learning_rate=0.01, clip=clip, weight_decay=0.1)
    rows = next(minibatches(Work(2, list(site.splits.values())[2].train, 2), how))
    expected = [torch.nn.Parameter(view.detach().clone()) for view in site.cohort.slices(2, KINDS).values()]
    for parameter, gradient in zip(expected, gradients(site, 2, rows), strict=True):
        parameter.grad = gradient
    if clip is not None:
        assert torch.nn.utils.clip_grad_norm_(expected, clip) > clip
    torch.optim.AdamW(expected, lr=0.01, weight_decay=0.1).step()
    loss = float(mean_loss(site, 2, rows))
    losses = fit(site, range(4), how, token_budget=9)
    found = [view.detach() for view in site.cohort.slices(2, KINDS).values()]
    torch.testing.assert_close(found, [p.detach() for p in expected], atol=1e-10, rtol=0)
    assert losses[2] == pytest.approx(loss, abs=1e-12)


def test_the_loss_reported_is_the_mean_over_the_rounds_steps(site):
    heard: list[tuple[int, int, float]] = []
    losses = fit(site, [0, 1], Optimization(steps=3, learning_rate=1e-12), on_step=lambda *said: heard.append(said))
    for slot in (0, 1):
        own = [(step, loss) for of, step, loss in heard if of == slot]
        assert [step for step, _ in own] == [1, 2, 3]
        assert sum(loss for _, loss in own) / 3 == pytest.approx(losses[slot])


def test_clients_that_are_done_stay_as_they_are_while_others_go_on(site):
    """Seen to fail with AdamW's decay applied at every step of the cohort."""
    how = Optimization(steps=None, epochs=1.0, batch_size=5, weight_decay=0.1)
    sizes = [len(split.train) for split in site.splits.values()]
    few, many = int(np.argmin(sizes)), int(np.argmax(sizes))
    assert -(-sizes[few] // 5) < -(-sizes[many] // 5)
    before = site.cohort.read(few, KINDS)
    fit(site, [few], how)
    alone = site.cohort.read(few, KINDS)
    site.cohort.write(few, before, 3, site.alpha)
    fit(site, [few, many], how)
    assert_same(site.cohort.read(few, KINDS), alone, atol=1e-9, rtol=0)


def test_slots_that_take_no_part_and_factors_that_do_not_learn_stay_bit_for_bit(site):
    before = [site.cohort.read(slot, frozenset("ABCH")) for slot in range(4)]
    fit(site, [1, 3], Optimization(steps=2), frozenset("BH"))
    for slot in (0, 2):
        assert_same(site.cohort.read(slot, frozenset("ABCH")), before[slot])
    for slot in (1, 3):
        assert_same(
            site.cohort.read(slot, frozenset("AC")), {k: v for k, v in before[slot].items() if k.factor in "AC"}
        )
    assert not any(parameter.requires_grad for parameter in site.cohort.model.parameters())


RATES = {
    "constant": [1, 1, 1, 1],
    "linear": [1, 3 / 4, 2 / 4, 1 / 4],
    "cosine": [(1 + np.cos(np.pi * k / 4)) / 2 for k in range(4)],
    "constant_with_warmup": [0, 1 / 2, 1, 1],
}


@pytest.mark.parametrize("schedule", RATES)
def test_a_schedule_spans_the_clients_own_steps_of_a_round(site, schedule, monkeypatch):
    """By the rates AdamW is really called with, of a client with four steps beside one with more."""
    rates: dict[int, list[float]] = {}
    step = torch.optim.AdamW.step

    def listening(self, *args, **kwargs):
        rates.setdefault(id(self), []).append(self.param_groups[0]["lr"])
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", listening)
    rows = next(iter(site.splits.values())).train
    works = [Work(0, rows[:8], 0), Work(1, rows, 1)]
    warmup = 2 if schedule == "constant_with_warmup" else 0
    how = Optimization(steps=None, epochs=2.0, batch_size=4, learning_rate=0.5, schedule=schedule, warmup=warmup)
    train.train(site.cohort, site.task, site.examples, works, how, KINDS)
    mine = next(found for found in rates.values() if len(found) == 4)
    assert max(map(len, rates.values())) > 4
    assert mine == pytest.approx([0.5 * rate for rate in RATES[schedule]])


def test_the_proximal_pull_is_half_mu_the_squared_distance_to_what_was_received(site):
    """Two plain steps: at the first the distance is 0, at the second the pull is μ (θ − θ_received)."""
    how = Optimization(steps=2, batch_size=64, clip=None, learning_rate=0.01)
    start = {key: view.detach().clone() for key, view in site.cohort.slices(0, KINDS).items()}
    results = []
    for mu in (0.0, 1e4):
        site.cohort.write(0, start, 3, site.alpha)
        fit(site, [0], replace(how, proximal=mu))
        results.append({key: view.detach().clone() for key, view in site.cohort.slices(0, KINDS).items()})
    moved = [max(float((own[key] - start[key]).abs().max()) for key in start) for own in results]
    assert moved[1] < moved[0]
    key = Key("classifier.bias", "H")
    assert (results[1][key] - start[key]).abs().max() < 0.01 < (results[0][key] - start[key]).abs().max()


def test_evaluation_is_the_mean_loss_and_the_share_of_hits_of_each_clients_own_rows(site):
    """Seen to fail with means of micro-batch means."""
    fit(site, range(4), Optimization(steps=3, learning_rate=0.01))
    rows = {slot: split.test for slot, split in enumerate(site.splits.values())}
    found = train.evaluate(site.cohort, site.task, site.examples, rows, token_budget=25)
    for slot, own in rows.items():
        with torch.no_grad():
            loss = mean_loss(site, slot, own)
            batch = site.examples.batch(own)
            logits = site.cohort.model(**{k: v for k, v in batch.items() if k != "labels"}).logits
        hits = (logits.argmax(-1) == batch["labels"]).double().mean()
        assert found[slot] == pytest.approx({"loss": float(loss), "accuracy": float(hits)}, abs=1e-12)


def test_features_are_the_same_in_any_batching_and_in_the_rows_order(site):
    rows = np.array([5, 3, 40, 17, 9])
    found = train.features(site.cohort, site.task, site.examples, rows, token_budget=1)
    np.testing.assert_allclose(found, train.features(site.cohort, site.task, site.examples, rows), atol=1e-6)
    swapped = train.features(site.cohort, site.task, site.examples, rows[::-1].copy())
    np.testing.assert_allclose(found[::-1], swapped, atol=1e-6)
    assert found.shape == (5, 16)
