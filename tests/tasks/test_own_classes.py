"""Laws of clients with label sets of their own: heads of different size in one run, which never meet each other."""

import json

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForImageClassification, AutoModelForSequenceClassification, AutoTokenizer

from fedtri.adapters.layout import Key
from fedtri.adapters.model import load
from fedtri.errors import FedtriError
from fedtri.runs import finished, lifecycle
from tiny import LABELS, NEEDS, assert_same, carry, clients_tensors, rounds, training_loss
from tiny_images import DIGITS

OWN = {"labels": "own", "head": "personal"}
VISION = {"kind": "vit", "task": "image_classification", **DIGITS, "partition": "dirichlet:0.5", **OWN}
TEXT = {"partition": "pathological:2", "targets": "auto", "clients": 3, **OWN}
WEIGHT, BIAS = Key("classifier.weight", "H"), Key("classifier.bias", "H")


@pytest.mark.parametrize("method", ["fedit", "ce_lora", "ditto", "ravan"])
def test_heads_of_different_size_are_trained(method, lab, tmp_path):
    """By local updates of each kind; heads are no part of a method.

    Seen to fail with heads of all classes, and with rows of other classes left open.
    """
    built = lab.federation(
        tmp_path, **({**VISION, "method": method, "data_options__limit": 200} | NEEDS.get(method, {}))
    )
    before = training_loss(built)
    list(rounds(built))
    sizes = {}
    for client, factors in clients_tensors(built).items():
        own = built.site.classes[client]
        split, labels = built.site.splits[client], built.site.executor.examples.labels
        held = {int(labels[row]) for rows in vars(split).values() for row in rows}
        assert held == set(own.tolist())
        assert factors[WEIGHT].shape == (len(own), 16)
        assert factors[BIAS].shape == (len(own),)
        assert torch.isfinite(factors[WEIGHT]).all()
        sizes[client] = len(own)
    assert len(set(sizes.values())) > 1
    assert training_loss(built) < before


@pytest.mark.parametrize(
    ("method", "values"), [("ditto", VISION), ("fedit", VISION), ("ce_lora", TEXT)], ids=["ditto", "images", "texts"]
)
def test_a_group_gives_each_client_what_it_gets_alone(method, values, lab, tmp_path):
    """In float64, in passes that clients share. Seen to fail with one client's classes shut for all."""
    common = {**values, "method": method, "double": True}
    together = lab.federation(tmp_path / "a", simulation__group=0, **common)
    alone = lab.federation(tmp_path / "b", simulation__group=1, **common)
    for built in (together, alone):
        list(rounds(built))
    assert_same(clients_tensors(together), clients_tensors(alone), atol=1e-9, rtol=0)


def test_a_client_never_answers_with_anothers_class(lab, tmp_path):
    """And its logits are those of a head of its own rows alone. Seen to fail with nothing shut."""
    built = lab.federation(tmp_path, method="fedit", **VISION)
    site = built.site
    task, batch = site.executor.task, site.executor.examples.batch(np.arange(8))
    for client in built.transport.clients():
        logits = task.logits(carry(built, client, site.initial(client)), batch)
        own = site.classes[client]
        assert (logits.argmax(-1)[:, None] == torch.from_numpy(own)).any(-1).all()
        assert torch.isinf(logits).sum(-1).tolist() == [10 - len(own)] * 8
    everyone = {**site.initial("client-00"), WEIGHT: torch.zeros(10, 16), BIAS: torch.zeros(10)}
    adapted = built.opened.adapted
    load(adapted, everyone, rank=3, alpha=6.0)
    assert torch.isfinite(task.logits(adapted.model, batch)).all()


def test_a_run_stopped_and_resumed_keeps_every_clients_classes(lab, tmp_path):
    config = lab.config(**{**VISION, "method": "ce_lora", "rounds": 3, "out": str(tmp_path / "run")})
    for _ in zip(lifecycle.run(config), range(1), strict=False):
        pass
    list(lifecycle.resume(tmp_path / "run"))
    list(lifecycle.run(config.model_copy(update={"out": str(tmp_path / "never")})))
    for client in ("client-00", "client-03"):
        resumed, never = (finished.open_client(tmp_path / name, client) for name in ("run", "never"))
        assert_same(resumed.factors, never.factors)
        assert resumed.own == never.own


def test_each_client_leaves_with_a_head_of_its_own_classes(lab, tmp_path):
    """In its adapter, in the merged model, and in what it answers. Seen to fail with the names of all classes."""
    config = lab.config(**{**VISION, "method": "fedit", "rounds": 1, "out": str(tmp_path / "run")})
    list(lifecycle.run(config))
    examples = lab.federation(tmp_path / "x", **VISION, method="fedit").site.executor.examples
    batch = examples.batch(np.arange(6))
    found = {}
    for client in ("client-00", "client-01", "client-02", "client-03"):
        adapter = tmp_path / "run" / "adapters" / client
        names = json.loads((adapter / "labels.json").read_text())
        finished.export(tmp_path / "run", client, tmp_path / client, merge=True)
        merged = AutoModelForImageClassification.from_pretrained(tmp_path / client)
        assert (
            list(merged.config.id2label.values()) == names == list(finished.open_client(tmp_path / "run", client).own)
        )
        base = AutoModelForImageClassification.from_pretrained(
            config.model, num_labels=len(names), ignore_mismatched_sizes=True
        )
        with torch.no_grad():
            logits = merged(batch["pixel_values"]).logits
            again = PeftModel.from_pretrained(base, adapter).eval()(pixel_values=batch["pixel_values"]).logits
        torch.testing.assert_close(again, logits, atol=1e-5, rtol=1e-5)
        found[client] = logits.shape[1]
    assert len(set(found.values())) > 1


def test_texts_are_answered_with_the_clients_own_classes(lab, tmp_path):
    """What predict says is what the merged model says."""
    list(lifecycle.run(lab.config(**{**TEXT, "method": "fedit", "rounds": 1, "out": str(tmp_path / "run")})))
    texts = ["a big cat", "the slate and the marble", "moss", "oak"]
    seen = set()
    for client in ("client-00", "client-01", "client-02"):
        own = finished.open_client(tmp_path / "run", client).own
        assert len(own) == 2
        answers = [answer.tuned.split() for answer in finished.predict(tmp_path / "run", client, texts)]
        assert {name for name, _ in answers} <= set(own) < set(LABELS)
        assert all(float(share) >= 0.5 for _, share in answers)
        finished.export(tmp_path / "run", client, tmp_path / client, merge=True)
        merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / client)
        inputs = AutoTokenizer.from_pretrained(tmp_path / client)(texts, return_tensors="pt", padding=True)
        with torch.no_grad():
            best = merged(**inputs).logits.argmax(-1)
        assert [merged.config.id2label[int(i)] for i in best] == [name for name, _ in answers]
        seen.add(own)
    assert len(seen) > 1


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"head": "shared"}, '"own" needs heads that stay at home, and fedit has one head for all'),
        ({"head": "default"}, "needs heads that stay at home, and fedit has one head for all"),
        ({"method": "centralized"}, "needs heads that stay at home, and centralized has one head for all"),
        ({"kind": "clip", "task": "image_text"}, "which task image_text has not"),
        ({"partition": "pathological:1", "clients": 4}, "leaves client-00 with one class, "),
    ],
)
def test_what_cannot_have_classes_of_its_own_is_one_line(values, said, lab, tmp_path):
    with pytest.raises(FedtriError) as caught:
        lab.federation(tmp_path, **{**VISION, "method": "fedit", **values})
    assert str(caught.value).startswith("labels: ")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
