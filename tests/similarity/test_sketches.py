"""Laws of the sketch: few examples are never told, twice is the same, a hostile one is refused in one line."""

import warnings

import numpy as np
import pytest
from safetensors.numpy import load, save

from fedtri.errors import FedtriError
from fedtri.messages import Mixture, Sketch
from fedtri.similarity import sketches


def features(n: int, d: int = 4, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, d)).astype(np.float32)


def assert_same(a: Sketch, b: Sketch) -> None:
    np.testing.assert_array_equal(a.counts, b.counts)
    assert a.mixtures.keys() == b.mixtures.keys()
    for label, mixture in a.mixtures.items():
        for name in ("weights", "means", "variances"):
            np.testing.assert_array_equal(getattr(mixture, name), getattr(b.mixtures[label], name))


def test_five_numbers_by_hand():
    found = sketches.fit(np.arange(5.0)[:, None], np.zeros(5, int), classes=1, seed=0)
    (mixture,) = found.mixtures.values()
    assert found.counts.tolist() == [5]
    assert (mixture.weights.tolist(), mixture.means.tolist()) == ([1.0], [[2.0]])
    np.testing.assert_allclose(mixture.variances, [[2.002]], rtol=1e-6)  # variance 2 and a floor of a thousandth


def test_without_labels_everything_is_one_class():
    found = sketches.fit(features(40), None, classes=1, seed=0)
    assert found.counts.tolist() == [40]
    assert list(found.mixtures) == [0]


def test_a_class_of_few_examples_is_not_sent():
    """Seen to fail with `smallest` compared to len(rows): ten copies of one example are that example."""
    labels = np.repeat([0, 1, 2], [20, 4, 10])
    z = features(34)
    z[24:] = z[24] * (1 + 1e-6 * features(10))  # as other passes round them
    found = sketches.fit(z, labels, classes=4, seed=0)
    assert found.counts.tolist() == [20, 0, 0, 0]
    assert list(found.mixtures) == [0]
    assert not any(row.tobytes() in sketches.encode(found) for row in z)


def test_no_component_stands_for_fewer_than_the_smallest_class():
    """An outlier's own component would be that example; seen to fail without the refit with fewer components."""
    z = features(40)
    z[0] += 100
    (mixture,) = sketches.fit(z, None, classes=1, seed=0).mixtures.values()
    assert mixture.weights.min() * len(z) >= 5 - 1e-4
    assert np.abs(mixture.means - z[0]).max(1).min() > 1


@pytest.mark.parametrize(("n", "most"), [(5, 1), (9, 1), (14, 2), (200, 3)])
def test_small_classes_have_fewer_components(n, most):
    (mixture,) = sketches.fit(features(n), None, classes=1, seed=0).mixtures.values()
    assert 1 <= len(mixture.weights) <= most


def test_same_seed_same_sketch_and_nothing_is_printed():
    z, labels = features(300), np.arange(300) % 3
    z[labels == 1] = np.round(z[labels == 1])  # many equal rows make k-means complain
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same(*(sketches.fit(z, labels, classes=3, seed=7) for _ in range(2)))


def test_constant_features_keep_positive_variances():
    z = features(20)
    z[:, 0] = 3
    (mixture,) = sketches.fit(z, None, classes=1, seed=0).mixtures.values()
    assert (mixture.variances > 0).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [({"features": np.full((9, 2), np.nan)}, "finite"), ({"labels": np.full(9, 3)}, r"0\.\.1, got 3\.\.3")],
)
def test_bad_input_is_named(change, message):
    given = {"features": features(9, 2), "labels": np.zeros(9, int)} | change
    with pytest.raises(FedtriError, match=message):
        sketches.fit(**given, classes=2, seed=0)


def test_the_wire_brings_back_the_same_sketch():
    labels = np.repeat([0, 1, 3], [50, 3, 20])
    said = sketches.fit(features(73), labels, classes=4, seed=0)
    data = sketches.encode(said)
    total = sum(len(m.weights) for m in said.mixtures.values())
    assert len(data) <= 4 * (2 * 4 + total * (1 + 2 * 4)) + 400
    assert_same(sketches.decode(data, classes=4, d=4), said)


def test_an_empty_sketch_travels():
    said = sketches.fit(features(6), np.arange(6) % 3, classes=3, seed=0)
    assert not said.mixtures
    assert_same(sketches.decode(sketches.encode(said), classes=3, d=4), said)


def honest() -> dict[str, np.ndarray]:
    """Two classes of two described, in two dimensions: 2 and 1 components."""
    one = Mixture(*(np.array(a, np.float32) for a in ([0.25, 0.75], [[0, 1], [2, 3]], [[1, 1], [2, 2]])))
    two = Mixture(*(np.array(a, np.float32) for a in ([1.0], [[4, 5]], [[3, 3]])))
    return load(sketches.encode(Sketch(np.array([8, 5], np.int32), {0: one, 1: two})))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("means", np.array([[0, 1], [2, np.nan], [4, 5]], np.float32)),
        ("means", np.array([[0, 1], [2, np.inf], [4, 5]], np.float32)),
        ("means", np.zeros((3, 3), np.float32)),
        ("means", np.zeros((3, 2), np.float64)),
        ("means", np.zeros((2, 2), np.float32)),
        ("variances", np.zeros((3, 2), np.float32)),
        ("variances", -np.ones((3, 2), np.float32)),
        ("weights", np.array([0.5, 0.4, 1], np.float32)),
        ("weights", np.array([-0.5, 1.5, 1], np.float32)),
        ("weights", np.ones((3, 1), np.float32)),
        ("counts", np.array([8, -5], np.int32)),
        ("counts", np.array([8, 0], np.int32)),
        ("counts", np.array([8], np.int32)),
        ("counts", np.array([8, 5], np.int64)),
        ("components", np.array([3, 0], np.int32)),
        ("components", np.array([-1, 4], np.int32)),
        ("components", np.array([2, 2], np.int32)),
        ("components", np.array([2, 2**31 - 1], np.int32)),
        ("more", np.zeros(1, np.float32)),
        ("means", None),
        ("weights", None),
    ],
)
def test_a_hostile_sketch_is_refused_in_one_line(name, value):
    arrays = honest()
    sketches.decode(save(arrays), classes=2, d=2)
    arrays = {k: v for k, v in (arrays | {name: value}).items() if v is not None}
    with pytest.raises(FedtriError, match=r"^sketch: .*$") as caught:
        sketches.decode(save(arrays), classes=2, d=2)
    assert "\n" not in str(caught.value)


def test_too_many_components_or_bytes_are_refused():
    data = save(honest())
    with pytest.raises(FedtriError, match=r"0\.\.1 components"):
        sketches.decode(data, classes=2, d=2, components=1)
    with pytest.raises(FedtriError, match="at most"):
        sketches.decode(data + bytes(2000), classes=2, d=2)


def test_any_bytes_are_a_sketch_or_an_error():
    """Every cut, and 3,000 single changed bytes: nothing but FedtriError escapes."""
    data, rng = save(honest()), np.random.default_rng(0)
    broken = [data[:n] for n in range(len(data))]
    for place, byte in zip(rng.integers(len(data), size=3000), rng.integers(256, size=3000), strict=True):
        broken.append(data[:place] + bytes([byte]) + data[place + 1 :])
    refused = 0
    for bad in broken:
        try:
            sketches.decode(bad, classes=2, d=2)
        except FedtriError:
            refused += 1
    assert len(data) <= refused < len(broken)


def test_directions_are_everyones_and_keep_distances():
    """Up to a scale that all share. Seen to fail with columns that are not orthonormal."""
    x = features(60, d=200)
    a, b = sketches.projected(x, 64, 1), sketches.projected(x[:20], 64, 1)
    np.testing.assert_allclose(a[:20], b, rtol=1e-5, atol=1e-6)
    assert a.shape == (60, 64)
    before, after = (np.linalg.norm(z[:30] - z[30:], axis=1) for z in (x, a))
    np.testing.assert_allclose(after / before, np.sqrt(64 / 200), rtol=0.35)
    assert sketches.projected(x, 200, 1) is sketches.projected(x, 0, 1) is x


def test_half_as_many_bytes_say_nearly_the_same():
    """Seen to fail with variances in float16, of which the small ones become 0."""
    found = sketches.fit(features(60, d=40) * 1e-3, None, classes=1, seed=0)
    whole, half = sketches.encode(found), sketches.encode(found, half=True)
    assert len(half) < 0.7 * len(whole)
    read = sketches.decode(half, classes=1, d=40, half=True)
    np.testing.assert_allclose(read.mixtures[0].means, found.mixtures[0].means, rtol=1e-3, atol=1e-7)
    np.testing.assert_allclose(read.mixtures[0].variances, found.mixtures[0].variances, rtol=2e-3)
    with pytest.raises(FedtriError, match="expected"):
        sketches.decode(half, classes=1, d=40)
    with pytest.raises(FedtriError, match=r"too large for float16; set similarity\.sketch_dims = 0"):
        sketches.encode(sketches.fit(features(60) * 1e6, None, classes=1, seed=0), half=True)
