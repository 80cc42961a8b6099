"""How far what was sent down lies from what it stands for: ρ = ‖M − B̂Â‖_F / ‖M‖_F of every layer, in factors.

M is the mean of the clients' products Σ p_k s_k B_kA_k, or the best approximation of M of rank r.
"""

import math
from collections.abc import Sequence

import torch

from fedtri.adapters.layout import Key
from fedtri.aggregation import means, pairs, products
from fedtri.messages import Reply
from fedtri.state import ServerState

LARGEST = 1024
"""Of m · r: beyond it an SVD of that size for every layer would cost more than the round, and ρ is not computed."""


def rho(before: ServerState, after: ServerState, replies: Sequence[Reply]) -> dict[str, dict[str, float]]:
    """{"exact": {layer: ρ}, "best_rank_r": {layer: ρ}}; empty where the replies do not hold both A and B of a layer.

    A dense W counts with what it grew by in the round. Where ranks differ, what was sent is that of the largest rank.
    """
    if not {"A", "B"} <= {key.factor for key in replies[0].up}:
        return {}
    exact: dict[str, float] = {}
    best: dict[str, float] = {}
    weights = means.example_weights(replies)
    for group in pairs.pairs(after, sorted(replies, key=lambda reply: reply.client)):
        if group.B.shape[1] * group.B.shape[3] > LARGEST:
            continue
        B, A = _sent(before, after, group)
        if A.shape[1] == 0:
            return {}
        one = torch.ones(1)
        rank = group.A.shape[2]
        nearest = products.best_low_rank(group.B.double(), group.A.double(), weights, rank)
        exact |= _by_layer(group, products.residual(group.B, group.A, weights, B, A))
        best |= _by_layer(group, products.residual(nearest[0][:, None], nearest[1][:, None], one, B, A))
    return {"exact": exact, "best_rank_r": best} if exact else {}


def logged(before: ServerState, after: ServerState, replies: Sequence[Reply]) -> dict[str, dict[str, dict[str, float]]]:
    """The round's "rho" for its log line; nothing for a method that sends no pair of A and B."""
    found = rho(before, after, replies)
    return {"rho": found} if found else {}


def _sent(before: ServerState, after: ServerState, group: pairs.Pairs) -> pairs.Pair:
    """What is sent down in the units of the group's scale, as one B and A a layer: the shared pair, and W's growth."""
    left = [group.B.new_zeros(len(group.layers), group.B.shape[2], 0)]
    right = [group.A.new_zeros(len(group.layers), 0, group.A.shape[3])]
    if all(after.deliveries.shared.get(Key(layer, "A")) == after.round for layer in group.layers):
        left.append(torch.stack([after.shared[Key(layer, "B")] for layer in group.layers]))
        right.append(torch.stack([after.shared[Key(layer, "A")] for layer in group.layers]))
    if all(Key(layer, "W") in after.shared for layer in group.layers):
        growth = torch.stack(
            [after.shared[Key(layer, "W")] - before.shared.get(Key(layer, "W"), 0) for layer in group.layers]
        )
        left.append(growth / group.scale)
        right.append(torch.eye(growth.shape[2], dtype=growth.dtype).expand(len(growth), -1, -1))
    return torch.cat(left, 2), torch.cat(right, 1)


def _by_layer(group: pairs.Pairs, values: torch.Tensor) -> dict[str, float]:
    """Six digits of each; a layer where M is zero, so that ρ is not finite, is left out."""
    found = zip(group.layers, values.tolist(), strict=True)
    return {layer: float(f"{value:.6g}") for layer, value in found if math.isfinite(value)}
