"""What a client says about its data, once: for each class a Gaussian mixture of frozen features.

    p(z | y) = Σ_c π_c N(z; μ_c, diag σ²_c)

Source: CE-LoRA, arXiv:2503.23869. What is never said: anything that stands for fewer than `smallest` distinct
examples, because the mean of one example IS that example's feature.
"""

import warnings

import numpy as np
from jaxtyping import Float, Int

from fedtri.errors import FedtriError
from fedtri.messages import Mixture, Sketch
from fedtri.seeds import derive

_FLOOR = 1e-3
"""Added to every variance, as a share of the features' mean variance: no component is a needle."""
_SAME = 1e-4
"""The part of a feature's size up to which two features are taken for one example's."""
_SMALLEST = 2.0**-24
"""The smallest number above 0 in float16."""
_HEADER = 1024
"""Bytes allowed for the safetensors header of five arrays (384 in practice)."""


def projected(features: Float[np.ndarray, "n d"], dims: int, seed: int) -> Float[np.ndarray, "n k"]:
    """The features on k = dims random directions, which are orthonormal and the same for all clients of a run.

    Distances shrink by about √(k / d), all alike, and a similarity does not depend on their scale (Johnson and
    Lindenstrauss 1984). Where dims is 0, or no smaller than d, they stay as they are.

    Args:
        features: As the frozen backbone gives them.
        dims: The number of directions; 0: all of the features.
        seed: The run's seed, from which everyone draws the directions.
    """
    d = features.shape[1]
    if not 0 < dims < d:
        return features
    rng = np.random.default_rng(derive(seed, "sketch directions"))
    directions = np.linalg.qr(rng.standard_normal((d, dims)))[0]
    return (features @ directions).astype(np.float32)


def fit(
    features: Float[np.ndarray, "n d"],
    labels: Int[np.ndarray, "n"] | None,
    *,
    classes: int,
    components: int = 3,
    smallest: int = 5,
    seed: int,
) -> Sketch:
    """The sketch of n examples' features; without labels, one mixture over everything stands as class 0.

    A class with fewer than `smallest` distinct examples gets no mixture, and its count is sent as 0. One with
    n distinct examples gets at most n // smallest components, and fewer until each weighs at least `smallest`
    examples, so that an outlier never becomes a component of its own. Arrays are float32; same input and
    seed, same sketch.

    Raises FedtriError when a feature is not finite or a label lies outside 0 … classes − 1.
    """
    labels = np.zeros(len(features), np.int64) if labels is None else labels
    if not np.isfinite(features).all():
        raise FedtriError("sketch: features must be finite, got NaN or infinity: try dtype float32 for the model")
    if len(labels) and not 0 <= labels.min() <= labels.max() < classes:
        raise FedtriError(f"sketch: labels must lie in 0..{classes - 1}, got {labels.min()}..{labels.max()}")
    features = features.astype(np.float64)
    floor = max(_FLOOR * float(features.var(0).mean()), 1e-12) if len(features) else 1e-12
    counts, mixtures = np.zeros(classes, np.int32), {}
    for label in np.unique(labels).tolist():
        rows = features[labels == label]
        most = min(components, _distinct(rows) // smallest)
        if most:
            counts[label] = len(rows)
            mixtures[label] = _mixture(rows, most, smallest, floor, seed)
    return Sketch(counts, mixtures)


def _distinct(rows: Float[np.ndarray, "n d"]) -> int:
    """How many examples differ by more than rounding does: copies of one come out of other passes a little different.

    Counted along one direction; two examples that differ may coincide there, which errs on the side of saying less.
    """
    along = np.sort(rows @ np.random.default_rng(0).standard_normal(rows.shape[1]))
    return 1 + int((np.diff(along) > _SAME * np.sqrt(np.square(along).mean())).sum())


def _mixture(rows: Float[np.ndarray, "n d"], most: int, smallest: int, floor: float, seed: int) -> Mixture:
    from sklearn.mixture import GaussianMixture  # 2 s to import, and a server needs none of it

    model = GaussianMixture(most, covariance_type="diag", reg_covar=floor, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a mixture that has not quite converged is a summary all the same
        weights = np.asarray(model.fit(rows).weights_)
    if most > 1 and weights.min() * len(rows) < smallest:
        return _mixture(rows, most - 1, smallest, floor, seed)
    return Mixture(*(np.asarray(a, np.float32) for a in (weights, model.means_, model.covariances_)))


def encode(sketch: Sketch, *, half: bool = False) -> bytes:
    """The sketch as safetensors: counts and components (int32, one a class), all components stacked.

    8 classes + 4 K (1 + 2 d) bytes and a header, K being the number of components of all classes together. Where it is
    to be `half`, float16 and half of the second term; it then holds standard deviations, whose range is smaller.

    Raises FedtriError where a number is too large for float16.
    """
    from safetensors.numpy import save

    present = [sketch.mixtures[label] for label in sorted(sketch.mixtures)]
    parts = np.zeros(len(sketch.counts), np.int32)
    parts[sorted(sketch.mixtures)] = [len(m.weights) for m in present]
    arrays = {"counts": sketch.counts.astype(np.int32), "components": parts}
    for name in ("weights", "means", "variances"):
        empty = np.zeros((0,) if name == "weights" else (0, 0))
        stacked = np.concatenate([getattr(m, name) for m in present]) if present else empty
        arrays[name] = np.ascontiguousarray(stacked, np.float32)
    if half:
        deviations = np.maximum(np.sqrt(arrays.pop("variances")), _SMALLEST)
        arrays |= {"deviations": deviations}
        arrays |= {name: arrays[name].astype(np.float16) for name in ("weights", "means", "deviations")}
        if not all(np.isfinite(value).all() for value in arrays.values()):
            raise FedtriError("sketch: a feature is too large for float16; set similarity.sketch_dims = 0")
    return save(arrays)


def most_bytes(classes: int, d: int, components: int = 3, *, half: bool = False) -> int:
    """The longest that a sketch of features of width d can be as bytes."""
    return _HEADER + 8 * classes + (2 if half else 4) * classes * components * (1 + 2 * d)


def decode(data: bytes, *, classes: int, d: int, components: int = 3, half: bool = False) -> Sketch:
    """The sketch in `data`, which may be hostile: features of width d, at most `components` a class.

    Raises FedtriError unless names, types and shapes are those `encode` writes, all numbers are finite,
    variances positive, counts and weights not negative, the weights of a class sum to 1 (to 1e-3), and the
    classes counted are the classes described. What is longer than such a sketch can be is not even parsed.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load

    limit = most_bytes(classes, d, components, half=half)
    _require(len(data) <= limit, f"at most {limit} bytes", f"{len(data)}")
    try:
        arrays = load(data)
    except (SafetensorError, KeyError, ValueError) as error:
        raise FedtriError(f"sketch: expected safetensors, got {len(data)} bytes that are not: {error}") from error

    total = arrays["weights"].size if "weights" in arrays else 0
    wide = (total, d if total else 0)
    spread, number = ("deviations", "float16") if half else ("variances", "float32")
    shapes = {"components": (classes,), "counts": (classes,), "means": wide, spread: wide, "weights": (total,)}
    expected = {name: (shape, "int32" if name[0] == "c" else number) for name, shape in sorted(shapes.items())}
    found = {name: (array.shape, str(array.dtype)) for name, array in sorted(arrays.items())}
    _require(found == expected, f"{expected}", f"{found}")

    counts, parts = arrays["counts"], arrays["components"]
    weights, means = (arrays[name].astype(np.float32) for name in ("weights", "means"))
    variances = np.square(arrays[spread].astype(np.float32)) if half else arrays[spread]
    _require(bool((counts >= 0).all()), "counts not negative", f"{counts.min(initial=0)}")
    bounded = bool(((parts >= 0) & (parts <= components)).all()) and int(parts.sum(dtype=np.int64)) == total
    _require(bounded, f"0..{components} components a class, {total} in all", f"{parts.tolist()}")
    _require(bool(((counts > 0) == (parts > 0)).all()), "a mixture for each class counted, and no other", "others")
    finite = all(np.isfinite(a).all() for a in (weights, means, variances))
    _require(finite, "finite numbers", "NaN or infinity")
    _require(bool((variances > 0).all()), "variances above 0", "one that is not")
    _require(bool((weights >= 0).all()), "weights not negative", "one that is")

    mixtures, start = {}, 0
    for label in np.flatnonzero(parts).tolist():
        rows = slice(start, start := start + int(parts[label]))
        mass = float(weights[rows].sum(dtype=np.float64))
        _require(abs(mass - 1) <= 1e-3, f"weights of class {label} that sum to 1", f"{mass:g}")
        mixtures[label] = Mixture(weights[rows], means[rows], variances[rows])
    return Sketch(counts, mixtures)


def _require(holds: bool, expected: str, got: str) -> None:
    if not holds:
        raise FedtriError(f"sketch: expected {expected}, got {got}: the client's message is refused")
