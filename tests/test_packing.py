"""Packed rows give what padded batches give, on every architecture that takes them, and never mix clients or texts."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedtri import models, packing
from fedtri.cohort import Cohort
from fedtri.factors import initial_factors
from fedtri.packing import _lay_out
from fedtri.routing import Routing
from tiny import SIZES, classifier

LENGTHS = [9, 3, 5, 4, 4, 12]
SLOTS = [0, 1, 1, 0, 0, 0]
PACKED = {"bert", "roberta", "distilbert", "gpt2", "llama", "mistral", "qwen2", "gpt_neox"}
"""MPNet has biases by distance of its own, so it goes on with padded batches."""


def cohort_of(kind: str, targets: str = "auto", layers: str = "all") -> Cohort:
    model = classifier(kind).double()
    head = models.initial_head(model, models.head_layers(model), set(), 0)
    on = Cohort(
        model, targets=models.find_targets(model, targets, layers), head=models.head_layers(model), clients=2, rank=2
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


@pytest.mark.parametrize("kind", sorted(SIZES))
def test_packed_rows_give_the_padded_batchs_logits_and_gradients(kind):
    """Two clients, six texts. Seen to fail without the mask, without positions, and with clients sharing rows."""
    on = cohort_of(kind)
    assert (on.packing is not None) == (kind in PACKED)
    found = []
    for pack in (False, True):
        on.train_only(frozenset("ACBH"))
        on.route(SLOTS, pack=pack)
        logits = on.model(**batch()).logits
        (logits * torch.arange(1.0, 4.0)).sum().backward()
        found.append([logits.detach(), *(on.stacked(key).grad.clone() for key in on.layout.keys(frozenset("ACBH")))])
    torch.testing.assert_close(found[0], found[1], atol=1e-10, rtol=1e-9)


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


@given(st.lists(st.tuples(st.integers(1, 70), st.integers(0, 3)), min_size=2, max_size=40), st.sampled_from([16, 384]))
def test_every_text_lies_whole_in_one_row_of_its_own_client(texts, hidden):
    """And no row is longer than the longest text needs by more than rows cost. Seen to fail with rows of any client."""
    lengths, slots = [n for n, _ in texts], [slot for _, slot in texts]
    rows = _lay_out(lengths, slots, hidden)
    if rows is None:
        return
    assert len(rows.texts) < len(texts)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    for text, (n, slot) in enumerate(texts):
        where = torch.nonzero(rows.texts == text)
        assert len(where) == n
        (row,) = set(where[:, 0].tolist())
        assert rows.owners[row] == slot
        assert torch.equal(where[:, 1], torch.arange(n) + where[0, 1])
        assert torch.equal(rows.positions[rows.texts == text], torch.arange(n))
        assert torch.equal(rows.source[rows.texts == text], torch.arange(starts[text], starts[text] + n))
