"""A head to start from: logistic regression on what enters the last layer of a client's head.

    min over W, b of  λ/2 ‖W‖² + Σ_i −log softmax(W x_i + b)[y_i]

λ is chosen by cross-validation on the client's own training examples: with few of them a weak λ fits their noise.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from fedtri.adapters.layout import Factors, Key, Layout
from fedtri.adapters.model import by_class
from fedtri.execution.executor import HeadInputs

FOLDS = 4
STRENGTHS = tuple(10.0 ** (power / 2) for power in range(4))
"""1 / λ, for inputs whose mean squared distance to their mean is 1; from 1 to 30 by half powers of ten."""
ROUGH, FINE = 1e-3, 1e-8
"""How small the gradient is when a fit ends: one of the cross-validation, and the one that is kept."""


@dataclass(frozen=True)
class LastLayer:
    """The last layer of a head: a row for each class."""

    weight: Float[np.ndarray, "classes d"]
    bias: Float[np.ndarray, "classes"] | None

    def logits(self, x: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n classes"]:
        """The scores of each class."""
        y = x @ self.weight.T
        return y if self.bias is None else y + self.bias


def fitted(
    layout: Layout, own: Factors, seen: HeadInputs, classes: Int[np.ndarray, "own"] | None, seed: int
) -> dict[Key, Tensor]:
    """The tensors of the last layer of a client's head, fitted to what enters it.

    Args:
        layout: Says which tensors are of that layer.
        own: The client's tensors, which give shapes and number types.
        seen: The layer's inputs and classes.
        classes: The classes that the client has a row for, ascending; None: all.
        seed: Of the cross-validation.
    """
    keys = {key.layer.rpartition(".")[2]: key for key in own if by_class(layout, key)}
    weight = own[keys["weight"]]
    labels = seen.classes if classes is None else np.searchsorted(classes, seen.classes)
    layer = fit(seen.inputs, labels, len(weight), bias="bias" in keys, seed=seed)
    found = {keys["weight"]: torch.from_numpy(layer.weight).to(weight)}
    if layer.bias is not None:
        found[keys["bias"]] = torch.from_numpy(layer.bias).to(weight)
    return found


def fit(
    x: Float[np.ndarray, "n d"], y: Int[np.ndarray, "n"], classes: int, *, bias: bool = True, seed: int = 0
) -> LastLayer:
    """The last layer that logistic regression gives for these inputs.

    A class that no example has gets a score that makes it about as likely as one example in n + 1 would: no weights and
    a low bias, or, where the layer has no bias, a row against the mean input. float64; the same input and seed give the
    same layer.

    Args:
        x: What enters the layer, for each of n ≥ 1 examples.
        y: Their classes, from 0 to classes − 1.
        classes: The number of rows.
        bias: Whether the layer has a bias.
        seed: Deals the examples to the folds of the cross-validation.
    """
    x = x.astype(np.float64)
    centre = x.mean(0) if bias else np.zeros(x.shape[1])
    size = float(np.sqrt(np.square(x - centre).sum(1).mean())) or 1.0
    scaled = (x - centre) / size
    found = _fit(scaled, y, classes, bias, _strength(scaled, y, classes, bias, seed))
    weight = found.weight / size
    return LastLayer(weight, None if found.bias is None else found.bias - weight @ centre)


def _strength(x: np.ndarray, y: np.ndarray, classes: int, bias: bool, seed: int) -> float:
    """The 1 / λ with the smallest loss on examples that were left out of the fit."""
    if len(x) < 2 or len(np.unique(y)) < 2:
        return STRENGTHS[0]
    folds = min(FOLDS, len(x))
    # sorted by class before they are dealt, so that every fold has its share of each
    order = np.random.default_rng(seed).permutation(len(x))
    order = order[np.argsort(y[order], kind="stable")]
    fold = np.empty(len(x), np.int64)
    fold[order] = np.arange(len(x)) % folds
    losses = [
        sum(
            _loss(_fit(x[fold != own], y[fold != own], classes, bias, strength, ROUGH), x[fold == own], y[fold == own])
            for own in range(folds)
        )
        for strength in STRENGTHS
    ]
    return STRENGTHS[int(np.argmin(losses))]


def _loss(layer: LastLayer, x: np.ndarray, y: np.ndarray) -> float:
    """The cross-entropy, summed."""
    logits = layer.logits(x)
    return float((np.logaddexp.reduce(logits, axis=1) - logits[np.arange(len(y)), y]).sum())


def _fit(x: np.ndarray, y: np.ndarray, classes: int, bias: bool, strength: float, tolerance: float = FINE) -> LastLayer:
    """The layer for one 1 / λ; rows of absent classes as `fit` says."""
    present = np.unique(y)
    weight, offset = np.zeros((classes, x.shape[1])), np.zeros(classes)
    if len(present) > 1:
        from sklearn.linear_model import LogisticRegression  # 1 s to import, and few runs need it

        model = LogisticRegression(C=strength, fit_intercept=bias, tol=tolerance, max_iter=10_000)
        model.fit(x, y)
        rows, shift = np.asarray(model.coef_), np.asarray(model.intercept_)
        if len(present) == 2:  # scikit-learn gives the score of one class against the other
            rows, shift = np.concatenate([-rows, rows]) / 2, np.concatenate([-shift, shift]) / 2
        weight[present], offset[present] = rows, shift
    found = LastLayer(weight, offset if bias else None)
    absent = np.setdiff1d(np.arange(classes), present)
    low = float(np.logaddexp.reduce(found.logits(x)[:, present], axis=1).mean() - np.log(len(x) + 1))
    if bias:
        offset[absent] = low
    elif (mean := x.mean(0)).any():
        weight[absent] = low * mean / np.square(mean).sum()
    return found
