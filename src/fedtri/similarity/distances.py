"""How far clients' data lie apart, by optimal transport between their sketches.

    MW2²(a, b) = min_P Σ_cd P_cd (‖μ_c − μ_d‖² + ‖σ_c − σ_d‖²)    classes, as Gaussian mixtures
    D_ij       = min_Q Σ_yz Q_yz MW2(y, z)                        clients, as class proportions
    data_ij    = exp(−D_ij / median of the off-diagonal D)

Sources, in this order: Delon & Desolneux 2020 (arXiv:1907.05254); Alvarez-Melis & Fusi 2020 (arXiv:2002.02923), at
class level; ours.
"""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from fedtri.messages import Mixture, Sketch

_NOISE = 1e-12
"""Squared distances below this share of the squared norms are float64 cancellation: they are zero."""
_GROUP, _BLOCK = 8, 24576
"""Clients, and class pairs, handled at once: wide enough for a matrix product, small enough for the cache."""


def class_distance(a: Mixture, b: Mixture) -> float:
    """MW2 between two mixtures with diagonal covariances: the root of the transport cost, in feature units.

    MW2² = min_P Σ_cd P_cd (‖μ_c − μ_d‖² + ‖σ_c − σ_d‖²), σ the standard deviations, P with the mixtures'
    weights as marginals. Source: Delon & Desolneux 2020, arXiv:1907.05254.
    """
    gap = _points(a)[:, None] - _points(b)  # (components of a, of b, 2 d)
    return max(_pot(_unit(a.weights), _unit(b.weights), (gap**2).sum(-1)), 0.0) ** 0.5


def client_distance(a: Sketch, b: Sketch) -> float:
    """Optimal transport between two clients' class proportions, with `class_distance` as the ground cost.

    A class's number plays no part: what is 0 here may be called 1 there. NaN when either sketch is empty.
    Source: the optimal-transport dataset distance, at class level, Alvarez-Melis & Fusi 2020,
    arXiv:2002.02923.
    """
    if not (a.mixtures and b.mixtures):
        return float("nan")
    cost = [[class_distance(y, z) for z in _described(b)] for y in _described(a)]
    return _pot(_proportions(a), _proportions(b), np.array(cost))


def data_distances(sketches: Sequence[Sketch]) -> Float[np.ndarray, "m m"]:
    """`client_distance` of every pair: symmetric, zero on the diagonal, NaN beside an empty sketch."""
    return extend_distances(np.zeros((0, 0)), sketches)


def extend_distances(known: Float[np.ndarray, "k k"], sketches: Sequence[Sketch]) -> Float[np.ndarray, "m m"]:
    """`data_distances` of all m sketches when those of the first k are known: a newcomer costs one row.

    Between components, one matrix product a client, and all its class pairs in one `transport`; between
    clients, POT pair by pair.
    """
    k, m = len(known), len(sketches)
    distances = np.full((m, m), np.nan)
    distances[:k, :k] = known
    np.fill_diagonal(distances, 0.0)
    proportions = [_proportions(sketch) for sketch in sketches]
    ends = np.cumsum([0] + [len(p) for p in proportions]).tolist()
    stack = _stack([mixture for sketch in sketches for mixture in _described(sketch)])
    present = [i for i, p in enumerate(proportions) if len(p)]
    new = [i for i in present if i >= k]
    for group in (new[n : n + _GROUP] for n in range(0, len(new), _GROUP)):
        start, stop = ends[group[0]], ends[group[-1] + 1]
        step = max(1, _BLOCK // (stop - start))
        tiles = [slice(n, min(n + step, stop)) for n in range(0, stop, step)]
        cost = np.hstack([_class_distances(stack, slice(start, stop), tile) for tile in tiles])
        for i, j in ((i, j) for i in group for j in present if j < i):
            block = cost[ends[i] - start : ends[i + 1] - start, ends[j] : ends[j + 1]]
            distances[i, j] = distances[j, i] = _pot(proportions[i], proportions[j], block)
    return distances


def _class_distances(stack: tuple[np.ndarray, np.ndarray, np.ndarray], mine: slice, others: slice) -> np.ndarray:
    """`class_distance` between each of some mixtures of a stack and each of others: (mine, others)."""
    weights, points, norms = stack
    k, width = points.shape[1:]
    product = points[mine].reshape(-1, width) @ points[others].reshape(-1, width).T
    product = product.reshape(-1, k, norms[:, others].shape[1], k).transpose(1, 3, 0, 2)  # (k, k, mine, others)
    scale = norms[:, None, mine, None] + norms[None, :, None, others]
    squared = transport(weights[:, mine, None], weights[:, None, others], scale - 2 * product)
    return np.sqrt(np.where(squared < _NOISE * scale.max((0, 1)), 0, squared))


def transport(
    a: Float[np.ndarray, "k *#n"], b: Float[np.ndarray, "l *#n"], cost: Float[np.ndarray, "k l *n"]
) -> Float[np.ndarray, "*n"]:
    """Exact optimal-transport costs of a batch of tiny problems: marginals a and b, ground costs k × l.

    For k = 3 the dual, max over u, v of a_1 u + a_2 v + Σ_j b_j min(cost_0j, cost_1j − u, cost_2j − v), is
    concave, and linear between the lines u = r_j, v = s_j and v − u = s_j − r_j, with r and s the rows 1 and
    2 of the cost less row 0. A maximum lies where two of them cross: all 3 l² crossings are tried. Each is
    dual feasible, so only rounding can err. Other k, and l > 6, go to POT one problem at a time.
    """
    if len(a) != 3 or len(b) > 6:
        return _one_by_one(a, b, cost)
    cost = np.ascontiguousarray(cost)
    r, s = cost[1] - cost[0], cost[2] - cost[0]

    def dual(u: np.ndarray, v: np.ndarray) -> np.ndarray:
        value = a[1] * u + a[2] * v
        for j, b_j in enumerate(b):
            value += b_j * np.minimum(cost[0, j], np.minimum(cost[1, j] - u, cost[2, j] - v))
        return value

    best = np.full(cost.shape[2:], -np.inf)
    for j in range(len(b)):
        for h in range(len(b)):
            for u, v in ((r[j], s[h]), (r[j], r[j] + s[h] - r[h]), (s[j] - s[h] + r[h], s[j])):
                np.maximum(best, dual(u, v), out=best)
    return best


def _one_by_one(a: np.ndarray, b: np.ndarray, cost: np.ndarray) -> np.ndarray:
    batch = cost.shape[2:]
    a, b = np.broadcast_to(a, (len(a), *batch)), np.broadcast_to(b, (len(b), *batch))
    values = [_pot(a[:, *n], b[:, *n], cost[:, :, *n]) for n in np.ndindex(batch)]
    return np.reshape(values, batch)


def _pot(a: np.ndarray, b: np.ndarray, cost: np.ndarray) -> float:
    """Exact optimal-transport cost, by network simplex."""
    import ot  # 0.3 s to import, and most methods need none of it

    a, b, cost = map(np.ascontiguousarray, (a, b, cost))
    return float(np.asarray(ot.emd2(a, b, cost, check_marginals=False, center_dual=False)))


def _described(sketch: Sketch) -> list[Mixture]:
    return [sketch.mixtures[label] for label in sorted(sketch.mixtures)]


def _proportions(sketch: Sketch) -> np.ndarray:
    return _unit(sketch.counts[sorted(sketch.mixtures)])


def _unit(weights: np.ndarray) -> np.ndarray:
    return weights.astype(np.float64) / weights.sum(dtype=np.float64)


def _points(mixture: Mixture) -> Float[np.ndarray, "components both"]:
    """(μ, σ) side by side: the squared distance between two such rows is the ground cost of MW2."""
    return np.hstack([mixture.means, np.sqrt(mixture.variances)]).astype(np.float64)


def _stack(mixtures: list[Mixture]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Weights (k, n), points (n, k, 2 d), their squared norms (k, n); a component that is missing weighs 0."""
    own = [_points(mixture) for mixture in mixtures]
    most = max([3, *map(len, own)])
    weights = np.zeros((most, len(own)))
    points = np.zeros((len(own), most, own[0].shape[1] if own else 0))
    for n, (mixture, rows) in enumerate(zip(mixtures, own, strict=True)):
        weights[: len(rows), n] = _unit(mixture.weights)
        points[n] = rows[np.minimum(np.arange(most), len(rows) - 1)]  # what pads is a copy: it brings no new scale
    return weights, points, np.einsum("nkd,nkd->kn", points, points)


def data_similarity(distances: Float[np.ndarray, "m m"]) -> Float[Tensor, "m m"]:
    """exp(−D / median off-diagonal D), in (0, 1]; float32, 1 on the diagonal.

    An unknown distance (NaN, beside an empty sketch) counts as the median: exp(−1), neither near nor far.
    When more than half of all pairs are at distance 0, the median is that of the others; when all are, all
    are similar: ones.
    """
    off = distances[np.triu(np.ones(distances.shape, bool), 1)]
    off = off[~np.isnan(off)]
    scale = np.median(off) if len(off) else 0.0
    if scale == 0 and (off > 0).any():
        scale = np.median(off[off > 0])
    similarity = torch.from_numpy(distances / (scale or 1.0)).float().nan_to_num_(nan=1.0).neg_().exp_()
    return similarity.fill_diagonal_(1.0)
