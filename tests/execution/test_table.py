"""The table of fast architectures: what stands in it is transformers' own forward pass; nothing else is fast."""

from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import BertForNextSentencePrediction, LlamaForSequenceClassification

from execution.clients import ENCODERS, adapted, client, examples, executor, model, run
from fedtri.adapters.model import AdaptedModel, install
from fedtri.errors import FedtriError
from fedtri.execution.fast import decoders
from fedtri.execution.fast.model import Frozen, SharedPass
from fedtri.execution.fast.table import ARCHITECTURES, why_not
from fedtri.models.loading import ATTENTION, find_targets, head_layers
from tiny import assert_same
from tiny_images import IMAGE_MODELS, vit


def differs(kind: str, task: str) -> float:
    """How far the written-out pass of an architecture is from transformers' own: logits and hidden states."""
    plain = model(kind, task)
    on = AdaptedModel(plain, install(model(kind, task), targets=[], head=[], rank=1).layout, "lora", {})
    held = examples(task)
    rows = np.arange(8)
    batch = {name: value for name, value in held.batch(rows).items() if name != "labels"}
    real = batch["attention_mask"].bool()
    fast = SharedPass(Frozen(on), (), np.zeros(8, np.int64))
    with torch.no_grad():
        logits, hidden = fast(**batch).logits, fast.base_model(**batch).last_hidden_state
        own, states = plain(**batch).logits, plain.base_model(**batch).last_hidden_state
    if logits.dim() == 3:
        logits, own = logits[real], own[real]
    return max(float((logits - own).abs().max()), float((hidden[real] - states[real]).abs().max()))


@pytest.mark.parametrize("task", ["classify", "tag", "continue"])
@pytest.mark.parametrize("kind", sorted(ARCHITECTURES))
def test_what_stands_in_the_table_is_transformers_own_forward_pass(kind, task):
    if task != "continue" or kind not in ENCODERS:
        assert differs(kind, task) < 1e-9


@pytest.mark.parametrize(
    ("kind", "instead"),
    [
        ("qwen3", replace(decoders.LLAMA, layer=decoders.llama_layer(lambda own: 2))),
        ("electra", ARCHITECTURES["roberta"]),
        ("bert", ARCHITECTURES["roberta"]),
        ("mpnet", replace(ARCHITECTURES["mpnet"], shape=ARCHITECTURES["bert"].shape)),
        ("gpt_neox", replace(ARCHITECTURES["gpt_neox"], finish=lambda backbone, x: x)),
    ],
)
def test_a_wrong_entry_is_found_out(kind, instead, monkeypatch):
    """What this file does is no formality: another family's pass, or one with a part left out, does not agree."""
    monkeypatch.setitem(ARCHITECTURES, kind, instead)
    with suppress(AttributeError, KeyError):  # some do not even run
        assert not differs(kind, "classify") < 1e-9


class Tuned(LlamaForSequenceClassification):
    """A class of somebody's own, whose forward pass may be another."""


def one(kind: str, **options: Any) -> AdaptedModel:
    return adapted(kind, targets="auto", model_options=options)


@pytest.mark.parametrize(
    ("kind", "options", "said"),
    [
        ("llama", {"attention_chunk_size": 8}, "its attention looks at chunks of 8 tokens"),
        ("bert", {"is_decoder": True}, "it is set up as a decoder"),
        ("gpt2", {"add_cross_attention": True}, "it attends to another model"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
            "it turns positions by the length of what it sees",
        ),
        ("gemma", {"use_bidirectional_attention": True}, "it looks both ways"),
    ],
)
def test_a_configuration_that_is_not_written_out_is_not_fast(kind, options, said):
    """And is trained correctly all the same, by the model's own forward pass. Seen to fail for every line left out of
    `refuses`."""
    on = one(kind, **options)
    assert why_not(on) == said
    by = executor(on)
    assert by.describe() == f"reference executor: {said}, so clients share no pass"
    clients = [client(on, number, 2) for number in range(2)]
    assert_same(run(by, clients), run(executor(on, name="reference"), clients))


def test_a_model_type_that_is_not_in_the_table_is_not_fast():
    plain, _ = vit()
    on = install(plain, targets=find_targets(plain, "auto"), head=head_layers(plain), rank=2)
    assert why_not(on) == "model type 'vit' is not in the table of fast architectures"
    assert set(ARCHITECTURES) <= set(ATTENTION)
    assert not set(ARCHITECTURES) & set(IMAGE_MODELS)


def test_a_class_of_ones_own_is_not_fast():
    shape = model("llama").config
    on = install(Tuned(shape), targets=[], head=["score"], rank=1)
    assert why_not(on) == "Tuned is not transformers' own"


def test_a_head_that_is_not_written_out_is_not_fast():

    on = install(BertForNextSentencePrediction(model("bert").config), targets=[], head=[], rank=1)
    assert why_not(on) == "BertForNextSentencePrediction's head is not in the table of fast architectures"


def test_quantised_weights_are_not_fast():
    assert why_not(replace(one("bert"), quantised=True)) == "its weights are quantised"


def test_asking_for_the_fast_one_in_vain_is_one_line():
    with pytest.raises(FedtriError, match=r'^simulation.executor: "fast" cannot be, since it is set up as a decoder;'):
        executor(one("bert", is_decoder=True), name="fast")
    assert executor(one("bert"), name="fast").describe().startswith("fast")


def test_layers_that_cannot_be_run_again_are_refused_in_one_line():
    plain = model("mpnet")
    on = install(plain, targets=find_targets(plain, "auto"), head=head_layers(plain), rank=2)
    executor(on, gradient_checkpointing=True)  # written out, any layer can be
    with pytest.raises(
        FedtriError, match=r"^model_options\.gradient_checkpointing: MPNetForSequenceClassification has no"
    ):
        executor(on, name="reference", gradient_checkpointing=True)
