"""Laws of the head that is fitted before the first training: the model then gives what the fitted classifier gives."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from execution.clients import adapted, client, examples, executor
from fedtri.adapters.model import by_class, load
from fedtri.errors import FedtriError
from fedtri.execution.executor import ClientModel, Scoring
from fedtri.federation import head_start, loop
from fedtri.federation.client import Site
from fedtri.federation.head_start import STRENGTHS, fit, fitted
from fedtri.runs import lifecycle
from fedtri.storage.client_store import beside
from fedtri.tasks.responses import IGNORED
from tiny import assert_same, rounds
from tiny_images import DIGITS

FIT = {"method": "fedit", "head": "personal", "head_start": "fit"}


def blobs(classes: int = 3, n: int = 60, d: int = 5, noise: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """n points around a centre a class, far from the origin and large."""
    rng = np.random.default_rng(0)
    y = np.arange(n) % classes
    return 40 + 10 * (2 * np.eye(classes, d)[y] + noise * rng.standard_normal((n, d))), y


@pytest.mark.parametrize("classes", [2, 3])
def test_its_scores_are_scikit_learns(classes):
    """Up to a constant a row, which no probability knows. Seen to fail with the inputs' mean left in the bias."""
    x, y = blobs(classes)
    layer = fit(x, y, classes)
    size = np.sqrt(np.square(x - x.mean(0)).sum(1).mean())
    found = [
        np.abs(torch.softmax(torch.from_numpy(layer.logits(x)), 1).numpy() - model.predict_proba(x / size)).max()
        for model in (LogisticRegression(C=C, tol=1e-10, max_iter=9999).fit(x / size, y) for C in STRENGTHS)
    ]
    assert min(found) < 1e-5


def test_noise_is_fitted_weakly_and_structure_strongly():
    """By cross-validation. Seen to fail with the largest loss in place of the smallest."""
    rng = np.random.default_rng(0)
    x, y = blobs(noise=0.1)
    plain = np.abs(fit(x, y, 3).weight).max()
    noise = np.abs(fit(x, rng.permutation(y), 3).weight).max()
    assert noise < plain / 5


@pytest.mark.parametrize("bias", [True, False])
def test_classes_that_no_example_has_are_about_as_likely_as_one_in_n_plus_1(bias):
    """Seen to fail with their scores at 0, and without a bias with the row along the mean's unit vector."""
    x, y = blobs()
    shares = torch.softmax(torch.from_numpy(fit(x, y, 5, bias=bias).logits(x)), 1).mean(0)
    assert shares[3:].numpy() == pytest.approx([1 / 61, 1 / 61], rel=0.6)
    assert (fit(x, y, 5, bias=bias).bias is not None) == bias


def test_one_class_and_one_example_are_no_error():
    layer = fit(np.ones((1, 3)), np.array([1]), 3)
    assert layer.logits(np.ones((1, 3))).argmax() == 1
    assert np.isfinite(layer.weight).all()


@pytest.mark.parametrize("name", ["reference", "fast"])
@pytest.mark.parametrize("task", ["classify", "tag"])
@pytest.mark.parametrize("kind", ["bert", "roberta", "mpnet", "distilbert", "llama"])
def test_the_models_logits_are_the_fitted_classifiers(kind, task, name):
    """Behind dense layers, with and without a bias, and for a client with some of the classes. Seen to fail with the
    backbone's features in place of the layer's inputs, and with the inputs in the order of the passes.
    """
    on, held = adapted(kind, task), examples(task)
    rows = np.array([5, 3, 30, 17, 9, 12, 1, 0, 22])
    own = None if task == "tag" else np.unique(held.batch(rows)["labels"].numpy())
    one = client(on, 0, classes=own)
    (seen,) = executor(on, task, name, examples=held, token_budget=40).head_inputs([Scoring(one, rows)])
    batch = held.batch(rows)
    labels = batch.pop("labels")
    real = labels != IGNORED
    assert seen.classes.tolist() == labels[real].tolist()
    layer = fitted(on.layout, one.factors, seen, own, 0)
    assert {key.layer.rpartition(".")[0] for key in layer} == {on.layout.head[-1][0].rpartition(".")[0]}
    load(on, {**one.factors, **layer}, rank=one.rank, alpha=one.alpha, classes=own)
    with torch.no_grad():
        logits = on.model(**batch).logits[real]
    weight = next(value for key, value in layer.items() if key.layer.endswith("weight")).numpy()
    bias = next((value.numpy() for key, value in layer.items() if key.layer.endswith("bias")), 0.0)
    expected = seen.inputs @ weight.T + bias
    np.testing.assert_allclose(logits if own is None else logits[:, own], expected, atol=1e-9)


def started(site: Site, name: str) -> ClientModel:
    return site.model(name, {**site.initial(name), **(site.store.load(beside(name, "head-start")) or {})})


@pytest.mark.parametrize("of", ["config", "tagging", "digits", "own classes"])
def test_a_client_starts_with_its_own_examples_fitted(of, lab, tmp_path):
    """Of texts, words and images; every client's loss is below that of the head that all started with."""
    values = {
        "digits": {**DIGITS, "kind": "vit", "task": "image_classification"},
        "own classes": {"labels": "own", "partition": "pathological:2"},
    }.get(of, {})
    built = lab.federation(tmp_path, of="tagging" if of == "tagging" else "config", **FIT, rounds=1, **values)
    list(rounds(built))
    site = built.site
    for name in site.clients:
        rows = site.splits[name].train
        work = [Scoring(one, rows) for one in (site.model(name, site.initial(name)), started(site, name))]
        before, after = site.executor.evaluate(work)
        assert after["loss"] < before["loss"]


def test_a_head_is_fitted_once_before_a_clients_first_training(lab, tmp_path, monkeypatch):
    """Newcomers' in the round they come, though others were trained and they were scored before. Seen to fail with the
    fit at every round, and with a client's own tensors as the sign that it has had its fit."""
    fitted_for: list[int] = []
    true = head_start.fitted
    monkeypatch.setattr(head_start, "fitted", lambda *given: (fitted_for.append(1), true(*given))[1])
    built = lab.federation(tmp_path, **FIT, fraction=0.5, simulation__group=1)
    torch.set_num_threads(1)
    (first,) = rounds(built, rounds=1)  # a run's last round scores everyone
    seen = set(first.line["clients"])
    assert len(fitted_for) == len(seen) < len(built.site.clients)
    schedule = replace(built.spec.schedule, rounds=5)
    for progress in loop.run(built.method, built.transport, built.spec.scales, schedule, state=first.state):
        seen |= set(progress.line["clients"])
        assert len(fitted_for) == len(seen)
    assert seen == set(built.site.clients)


def test_the_optimiser_starts_from_the_fitted_head(lab, tmp_path):
    """With steps that move nothing, what is kept is the fitted head. Seen to fail with the fit left out."""
    built = lab.federation(tmp_path, **FIT, rounds=1, learning_rate=1e-12)
    list(rounds(built))
    for name in built.site.clients:
        kept, layer = built.site.kept(name), built.site.store.load(beside(name, "head-start"))
        assert layer is not None
        assert all(by_class(built.spec.layout, key) for key in layer)
        assert_same({key: kept[key] for key in layer}, dict(layer), atol=1e-6, rtol=0)


def test_stopped_and_resumed_is_never_stopped(lab, tmp_path):
    """With clients that come in the later rounds."""
    config = lab.config(**FIT, rounds=3, fraction=0.5, out=str(tmp_path / "whole"))
    *_, whole = lifecycle.run(config)
    first = lifecycle.run(config.model_copy(update={"out": str(tmp_path / "cut")}))
    next(first)
    first.close()
    *_, resumed = lifecycle.resume(tmp_path / "cut")
    assert_same(resumed.state, whole.state)
    assert resumed.line["accuracy"] == whole.line["accuracy"]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"head": "shared"}, '"fit" needs heads that stay at home, and fedit has one head for all; set head = "person'),
        ({"head": "default"}, '"fit" needs heads that stay at home'),
        ({"method": "centralized"}, '"fit" needs heads that stay at home, and centralized has one head for all'),
        ({"kind": "clip", **DIGITS, "task": "image_text"}, 'which task image_text has not; set head_start = "initial"'),
    ],
)
def test_what_has_no_head_of_its_own_is_one_line(values, said, lab, tmp_path):
    with pytest.raises(FedtriError) as caught:
        lab.federation(tmp_path, **{**FIT, **values})
    assert str(caught.value).startswith("head_start: ")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_continuing_texts_has_no_head(lab, tmp_path):
    with pytest.raises(FedtriError, match=r"^head_start: .* which task causal_lm has not"):
        lab.federation(tmp_path, of="language", **FIT)
