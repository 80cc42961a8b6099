"""Where the head reads first tokens only, leaving out the others of the last layer changes no logit and no gradient."""

import pytest
import torch

from fedtri.execution import routing, trim
from test_packing import SLOTS, batch, cohort_of
from tiny import SIZES, classifier

TRIMMED = {"bert", "roberta", "distilbert", "mpnet"}
"""The others' heads read the last token."""


@pytest.mark.parametrize("even", [False, True], ids=["packed or padded", "no mask"])
@pytest.mark.parametrize("kind", sorted(SIZES))
def test_trimmed_passes_give_the_same_logits_and_gradients(kind, even):
    """Adapters behind the cut, too. Seen to fail with a cut at the second token, and without routing of the rest."""
    on = cohort_of(kind, "intermediate.dense,query" if kind == "bert" else "auto")
    assert (on.trim is not None) == (kind in TRIMMED)
    inputs = {"input_ids": batch()["input_ids"][:, :3]} if even else batch()
    found = []
    for pack in (False, True):
        on.train_only(frozenset("ACBH"))
        on.route(SLOTS, pack=pack)
        logits = on.model(**inputs).logits
        (logits * torch.arange(1.0, 4.0)).sum().backward()
        found.append([logits.detach(), *(on.stacked(key).grad.clone() for key in on.layout.keys(frozenset("ACBH")))])
    torch.testing.assert_close(found[0], found[1], atol=1e-10, rtol=1e-9)


def test_the_last_layer_sees_one_token_a_text_behind_its_attention():
    """And its query before that; all tokens where features are asked of the backbone itself. Seen to fail uncut."""
    on = cohort_of("bert")
    seen: dict[str, list[int]] = {}
    last = on.model.bert.encoder.layer[-1]
    for name in ("attention.self.query", "attention.self.key", "attention.self.value", "intermediate"):
        own = seen.setdefault(name, [])
        count = lambda module, args, own=own: own.append(args[0].shape[:2].numel())  # noqa: E731
        last.get_submodule(name).register_forward_pre_hook(count)
    for call in (on.model, on.model.bert):
        on.route(SLOTS, pack=True)
        call(**batch())
    real = int(batch()["attention_mask"].sum())
    assert [own[0] == len(SLOTS) for own in seen.values()] == [True, False, False, True]
    assert all(own[1] >= real for own in seen.values())


def test_a_head_that_reads_more_than_first_tokens_is_left_alone():
    """Seen to fail with a trial that always agrees."""
    model = classifier("bert")
    model.bert.pooler.register_forward_hook(lambda module, args, out: out + args[0].mean(1))
    assert trim.prepare(model, routing.Routing()) is None
    assert not any(part._forward_pre_hooks for part in model.modules())
