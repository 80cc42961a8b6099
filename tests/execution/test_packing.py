"""Packed rows give what padded batches give, on every architecture that takes them, and never mix clients or texts."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedtri.adapters.bank import Cohort
from fedtri.adapters.initial import initial_factors
from fedtri.execution import packing
from fedtri.execution.packing import _for_attention, _for_layers
from fedtri.execution.routing import Routing
from fedtri.models import loading
from tiny import SIZES, classifier

LENGTHS = [9, 3, 5, 4, 4, 12]
SLOTS = [0, 1, 1, 0, 0, 0]
PACKED = {"bert", "roberta", "distilbert", "gpt2", "llama", "mistral", "qwen2", "gpt_neox"}
"""MPNet has biases by distance of its own, so it goes on with padded batches."""


def cohort_of(kind: str, targets: str = "auto", layers: str = "all", attention: str = "sdpa") -> Cohort:
    model = classifier(kind).double()
    model.set_attn_implementation(attention)
    head = loading.initial_head(model, loading.head_layers(model), set(), 0)
    on = Cohort(
        model, targets=loading.find_targets(model, targets, layers), head=loading.head_layers(model), clients=2, rank=2
    )
    for slot in (0, 1):
        factors = {
            key: torch.randn(value.shape, generator=torch.Generator().manual_seed(slot), dtype=torch.float64)
            for key, value in initial_factors(on.layout, head, rank=2, seed=0).items()
        }
        on.write(slot, factors, 2, 4.0)
    return on


def batch(side: str = "right") -> dict[str, torch.Tensor]:
    ids, mask = torch.zeros(6, 12, dtype=torch.long), torch.zeros(6, 12, dtype=torch.long)
    for row, n in enumerate(LENGTHS):
        where = slice(0, n) if side == "right" else slice(12 - n, 12)
        ids[row, where] = torch.arange(n) % 20 + 5 + row
        mask[row, where] = 1
    return {"input_ids": ids, "attention_mask": mask}


def logits_and_gradients(on: Cohort, pack: bool) -> list[torch.Tensor]:
    on.train_only(frozenset("ACBH"))
    on.route(SLOTS, pack=pack)
    logits = on.model(**batch()).logits
    (logits * torch.arange(1.0, 4.0)).sum().backward()
    return [logits.detach(), *(on.stacked(key).grad.clone() for key in on.layout.keys(frozenset("ACBH")))]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", sorted(SIZES))
def test_packed_texts_give_the_padded_batchs_logits_and_gradients(kind, attention):
    """Two clients, six texts, end to end and in rows. Seen to fail without the mask, without positions, and with
    clients sharing rows.
    """
    if kind == "mpnet" and attention == "sdpa":
        attention = "eager"  # it has no other
    on = cohort_of(kind, attention=attention)
    assert (on.packing is not None) == (kind in PACKED)
    if on.packing is not None:
        assert on.packing.end_to_end == (attention == "sdpa")
    torch.testing.assert_close(
        logits_and_gradients(on, False), logits_and_gradients(on, True), atol=1e-10, rtol=1e-9
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["bert", "llama"])
@pytest.mark.parametrize("way", ["filled up", "fused kernel"])
def test_nor_do_tokens_that_nobody_reads_or_wide_rows_change_them(kind, way, monkeypatch):
    """37 tokens filled up to 64, and the path of rows that are too wide to write attention out. Seen to fail without
    the scale in one gradient, and with tokens routed in another order.
    """
    on = cohort_of(kind)
    padded = logits_and_gradients(on, False)
    on.packing.multiple = 64 if way == "filled up" else 1
    monkeypatch.setattr("fedtri.execution.attention.WRITTEN_OUT", 96 if way == "filled up" else 0)
    torch.testing.assert_close(padded, logits_and_gradients(on, True), atol=1e-10, rtol=1e-9)


def test_texts_longer_than_a_layer_looks_are_not_packed():
    """A decoder whose layers look at the last 8 tokens, texts of up to 12. Seen to fail without asking for it."""
    model = classifier("mistral", sliding_window=8).double()
    assert model.config.sliding_window == 8
    routing = Routing()
    assert packing.prepare(model, routing) is not None
    routing.set(torch.zeros(6, dtype=torch.long))
    with torch.no_grad():
        padded = model(**batch()).logits
        routing.packing = True
        torch.testing.assert_close(model(**batch()).logits, padded)


def test_padding_may_stand_on_either_side():
    """A decoder's hidden states at the real tokens, and zeros elsewhere."""
    on = cohort_of("llama")
    for side in ("left", "right"):
        on.route(SLOTS, pack=True)
        hidden = on.model.base_model(**batch(side)).last_hidden_state
        real = batch(side)["attention_mask"].bool()
        assert not hidden[~real].any()
        on.route(SLOTS)
        for row, n in enumerate(LENGTHS):
            on.route([SLOTS[row]])
            alone = on.model.base_model(input_ids=batch(side)["input_ids"][row][real[row]][None]).last_hidden_state[0]
            torch.testing.assert_close(hidden[row][real[row]], alone, atol=1e-10, rtol=1e-9)
            assert len(alone) == n


def test_a_model_whose_results_differ_goes_on_padded():
    """A backbone that looks at its neighbours across texts. Seen to fail with a trial that always agrees."""
    model = classifier("bert")
    attention = model.bert.encoder.layer[0].attention
    attention.register_forward_hook(lambda module, args, out: (out[0] + out[0].mean(1, keepdim=True), *out[1:]))
    assert packing.prepare(model, Routing()) is None
    assert not model.bert._forward_pre_hooks
    assert not model.bert.encoder._forward_hooks


def lies_in_one_row(rows: packing._Rows, text: int, lengths: list[int]) -> int:
    """The row in which a text lies, from one place to the next."""
    where, n, start = torch.nonzero(rows.texts == text), lengths[text], sum(lengths[:text])
    assert len(where) == n
    (row,) = set(where[:, 0].tolist())
    assert torch.equal(where[:, 1], torch.arange(n) + where[0, 1])
    assert torch.equal(rows.positions[rows.texts == text], torch.arange(n))
    assert torch.equal(rows.source[rows.texts == text], torch.arange(start, start + n))
    assert torch.equal(rows.places[start : start + n], where[:, 0] * rows.texts.shape[1] + where[:, 1])
    return row


@given(st.lists(st.tuples(st.integers(1, 70), st.integers(0, 3)), min_size=2, max_size=40), st.sampled_from([16, 384]))
def test_every_text_lies_whole_in_one_row_of_its_own_client(texts, hidden):
    """And there are fewer rows than texts. Seen to fail with rows of any client."""
    lengths, slots = [n for n, _ in texts], [slot for _, slot in texts]
    found = _for_layers(lengths, slots, hidden)
    if found is None:
        return
    rows, owners = found
    assert len(owners) == len(rows.texts) < len(texts)
    for text, slot in enumerate(slots):
        assert owners[lies_in_one_row(rows, text, lengths)] == slot


@given(st.lists(st.tuples(st.integers(1, 300), st.integers(0, 3)), min_size=1, max_size=40))
def test_attentions_rows_hold_every_text_whole_and_suit_the_processor(texts):
    """Of any length, a row's of one client. Seen to fail with the width that texts fill, not the next multiple."""
    lengths, slots = [n for n, _ in texts], [slot for _, slot in texts]
    rows = _for_attention(lengths, slots)
    assert rows.texts.shape[1] % 16 == 0
    assert int((~rows.empty).sum()) == sum(lengths) == len(rows.places)
    owner = torch.tensor(slots).repeat_interleave(torch.tensor(lengths))
    assert (owner[rows.source] == owner[rows.source[:, :1]]).all()
    for text in range(len(lengths)):
        lies_in_one_row(rows, text, lengths)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_client_whose_numbers_are_none_any_more_spoils_no_other(attention):
    """One has learned NaN and shares the pass. Seen to fail with attention's rows of any client."""
    on = cohort_of("bert", attention=attention)
    clean = logits_and_gradients(on, True)
    keys = on.layout.keys(frozenset("ACBH"))
    with torch.no_grad():
        for key in keys:
            on.stacked(key)[0] = float("nan")
    spoilt = logits_and_gradients(on, True)
    others = [row for row, slot in enumerate(SLOTS) if slot == 1]
    torch.testing.assert_close(spoilt[0][others], clean[0][others], atol=1e-10, rtol=1e-9)
    assert spoilt[0][0].isnan().all()
    for found, expected in zip(spoilt[1:], clean[1:], strict=True):
        torch.testing.assert_close(found[1], expected[1], atol=1e-10, rtol=1e-9)
