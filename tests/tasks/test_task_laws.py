"""Every task is learned on tiny models, and the laws that a task could break hold for each task."""

import math
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification

from fedtri.execution.executor import Scoring
from fedtri.runs import finished, lifecycle, simulation
from tiny import NEEDS, assert_same, clients_tensors, opened_again, rounds

LANGUAGE = ("llama", "qwen2", "gpt2")
FAST = {"learning_rate": 2e-2, "steps": 6}
"""Enough for two rounds to be seen in the loss."""
FASTER = {"fed_sb": {"learning_rate": 5e-2, "steps": 15}}
"""Nine numbers a layer are all that learns here."""


LEARNS = [("llama", method) for method in ("fedit", "ce_lora", "ravan", "full", "ditto", "centralized", "fed_sb")]
"""No method sees the task: they stand for what clients hold and how they train."""


@pytest.mark.parametrize(("kind", "method"), [*LEARNS, ("qwen2", "fedit"), ("gpt2", "ce_lora")])
def test_methods_learn_to_answer(method, kind, lab, tmp_path):
    learns(lab.federation(tmp_path, of="language", kind=kind, method=method, **needed(method)))


@pytest.mark.parametrize("method", ["fedit", "ce_lora", "full", "ditto"])
def test_methods_learn_to_tag(method, lab, tmp_path):
    learns(lab.federation(tmp_path, of="tagging", method=method, **needed(method)))


def needed(method: str) -> dict[str, Any]:
    return FAST | FASTER.get(method, {}) | NEEDS.get(method, {})


def learns(built: simulation.Federation) -> None:
    """Two rounds, half of the clients in each, with finite numbers and a test loss below the untrained model's."""
    began = start(built)
    lines = [progress.line for progress in rounds(built, fraction=0.5)]
    assert len(lines) == 2
    assert all(math.isfinite(line["loss"]) for line in lines)
    assert set(lines[-1]["test_loss"]["clients"]) == set(built.transport.clients())
    assert lines[-1]["test_loss"]["mean"] < began


def start(built: simulation.Federation) -> float:
    """The mean test loss before anything was learned."""
    site, losses = built.site, []
    for client in built.transport.clients():
        (found,) = site.executor.evaluate([Scoring(site.model(client, site.initial(client)), site.splits[client].test)])
        losses.append(found["loss"])
    return sum(losses) / len(losses)


CLOSELY = [
    ("language", {"kind": "llama", "method": "fedit"}),
    ("language", {"kind": "qwen2", "method": "ce_lora"}),
    ("language", {"kind": "gpt2", "method": "fedit"}),
    ("language", {"kind": "llama", "model_options__gradient_checkpointing": True}),
    ("tagging", {"method": "ce_lora"}),
]


@pytest.mark.parametrize(("of", "values"), CLOSELY)
def test_a_group_gives_each_client_what_it_gets_alone(of, values, lab, tmp_path):
    """Seen to fail with a loss that is the mean over the pooled batch's tokens, and with a recomputation
    that meets another client's factors."""
    common = {"of": of, "double": True, "partition": "iid", "epochs": 1.0, "steps": None, "batch_size": 6, **values}
    together = lab.federation(tmp_path / "together", **common, simulation__group=0, simulation__token_budget=40)
    other = {name: value for name, value in common.items() if "checkpointing" not in name}
    alone = lab.federation(tmp_path / "alone", **other, simulation__group=1, simulation__token_budget=2048)
    for built in (together, alone):
        list(rounds(built))
    assert_same(clients_tensors(together), clients_tensors(alone), atol=1e-9, rtol=0)


@pytest.mark.parametrize("of", ["language", "tagging"])
def test_stopped_and_resumed_is_never_stopped(of, lab, tmp_path):
    """Seen to fail with a seed of the batches that leaves out the round."""
    whole, broken = (getattr(lab, of)(out=str(tmp_path / name), rounds=3) for name in ("whole", "broken"))
    expected = list(lifecycle.run(whole))[-1]
    next(iter(lifecycle.run(broken)))
    found = list(lifecycle.resume(tmp_path / "broken"))[-1]
    assert_same(found.state, expected.state)
    for adapter in sorted((tmp_path / "whole" / "adapters").glob("*/*.safetensors")):
        again = tmp_path / "broken" / adapter.relative_to(tmp_path / "whole")
        assert again.read_bytes() == adapter.read_bytes()


EXPORTED = [("language", AutoModelForCausalLM, {"kind": kind}) for kind in LANGUAGE]


@pytest.mark.parametrize(("of", "auto", "values"), [*EXPORTED, ("tagging", AutoModelForTokenClassification, {})])
def test_peft_and_the_merged_model_answer_as_the_client_did(of, auto, values, lab, tmp_path):
    """Seen to fail with B in place of B·C."""
    config = getattr(lab, of)(out=str(tmp_path / "run"), rounds=1, clients=2, **FAST, **values)
    list(lifecycle.run(config))
    own = finished.open_client(tmp_path / "run", "client-01")
    model, _ = opened_again(config, own.factors, own.spec.labels)
    ids = torch.tensor([[2, 8, 9, 20], [2, 21, 30, 7]])
    more = {"num_labels": len(own.spec.labels), "ignore_mismatched_sizes": True} if of == "tagging" else {}
    untuned = auto.from_pretrained(config.model, **more).eval()
    with torch.no_grad():
        expected, before = model(input_ids=ids).logits, untuned(input_ids=ids).logits
        loaded = PeftModel.from_pretrained(untuned, tmp_path / "run" / "adapters" / "client-01").eval()
        torch.testing.assert_close(loaded(input_ids=ids).logits, expected, atol=1e-5, rtol=1e-5)
        finished.export(tmp_path / "run", "client-01", tmp_path / "merged", merge=True)
        merged = auto.from_pretrained(tmp_path / "merged").eval()
        torch.testing.assert_close(merged(input_ids=ids).logits, expected, atol=1e-5, rtol=1e-5)
    assert (expected - before).abs().max() > 1e-3
