"""A client's gradient is that of its mean loss with respect to each adapted layer's update, for every task and kind."""

import numpy as np
import pytest
import torch
from torch import Tensor

from execution.clients import adapted, client, executor
from fedtri.adapters.layer import weight_of
from fedtri.adapters.layout import Factors, Key
from fedtri.adapters.model import AdaptedModel, load
from fedtri.errors import FedtriError
from fedtri.execution.executor import ClientModel, Executor
from tiny import assert_same

ROWS = np.arange(3, 17)


def gradient(by: Executor, models: list[ClientModel], rows: list[np.ndarray]) -> list[Factors]:
    keep = lambda dense: {Key(name, "W"): value.clone() for name, value in dense.items()}  # noqa: E731
    return by.gradients(models, rows, [keep] * len(models))


def start(on: AdaptedModel, number: int, zero: str = "B") -> ClientModel:
    return client(on, number, zero=zero)


def by_differences(on: AdaptedModel, by: Executor, own: ClientModel, direction: dict[Key, Tensor]) -> float:
    """The derivative of the mean loss where the product B C A of every layer moves along `direction`."""
    from fedtri.execution.executor import Scoring

    found = []
    for step in (1e-5, -1e-5):
        moved = {}
        for key, towards in direction.items():
            layer = on.layer(key.layer)
            scale = weight_of(layer.base) if on.kind == "hira" else 1.0
            moved[key] = step * towards * scale
        at = ClientModel(own.client, {**own.factors, **moved}, own.rank, own.alpha, own.classes)
        found.append(by.evaluate([Scoring(at, ROWS, further=False)])[0]["loss"])
    return (found[0] - found[1]) / 2e-5


@pytest.mark.parametrize(
    ("kind", "task", "how"),
    [
        ("bert", "classify", {}),
        ("bert", "classify", {"kind": "dora"}),
        ("bert", "classify", {"kind": "hira"}),
        ("gpt2", "continue", {}),
        ("bert", "tag", {}),
    ],
    ids=str,
)
def test_it_is_the_loss_derivative_along_any_direction(kind, task, how):
    """By differences of the loss itself, padded batches of few tokens. Seen to fail with the loss summed over batches
    that are each divided by their own number of terms, and for HiRA without the product with W0."""
    on = adapted(kind, task, **how)
    by = executor(on, task, "reference", token_budget=40)
    own = start(on, 0)
    if on.kind == "dora":  # where everyone starts, a row's magnitude is its norm
        own = ClientModel(own.client, {**own.factors, **{k: v.double() for k, v in on.initial.items()}}, 3, 6.0)
    (found,) = gradient(by, [own], [ROWS])
    rng = torch.Generator().manual_seed(0)
    direction = {key: torch.randn(value.shape, generator=rng, dtype=torch.float64) for key, value in found.items()}
    along = sum(float((value * direction[key]).sum()) for key, value in found.items())
    assert along == pytest.approx(by_differences(on, by, own, direction), rel=1e-4)


def test_every_executor_gives_the_same_and_leaves_nothing_behind():
    """Whoever is beside a client, and whatever the passes. Seen to fail with W left in the layers: it is in the next
    client's way."""
    on = adapted("bert")
    models, rows = [start(on, 0), start(on, 1)], [ROWS, np.arange(20, 33)]
    alone = [gradient(executor(on, name="reference", group=1), [m], [r])[0] for m, r in zip(models, rows, strict=True)]
    together = gradient(executor(on, name="fast", group=0, token_budget=30), models, rows)
    for mine, theirs in zip(together, alone, strict=True):
        assert_same(mine, theirs, atol=1e-9, rtol=0.0)
    assert not any(on.layer(layer.name).factors for layer in on.layout.layers)
    load(on, models[0].factors, rank=3, alpha=6.0)
    assert all("W" not in on.layer(layer.name).factors for layer in on.layout.layers)


def test_rows_without_a_loss_have_no_gradient():
    by = executor(adapted("bert"), name="reference")
    with pytest.raises(FedtriError, match=r"^basis: client-0 has no training example with a label or a response"):
        gradient(by, [start(adapted("bert"), 0)], [np.empty(0, np.int64)])
