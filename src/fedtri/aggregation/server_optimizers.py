"""The server as an optimiser: the average's move is a gradient, followed by momentum or by Adam.

Δ = average − what was shared before. FedAvgM (arXiv:1909.06335): v ← β₁v + Δ, shared ← before + ηv. FedAdam
(arXiv:2003.00295): m ← β₁m + (1 − β₁)Δ, v ← β₂v + (1 − β₂)Δ², shared ← before + ηm / (√v + τ). A tensor that is
averaged for the first time has no Δ yet, as the server never held what clients started from: it is shared as it is.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from fedtri.adapters.layout import Key, key_name
from fedtri.state import ServerState

ServerOptimizer = Callable[[ServerState, ServerState], ServerState]
"""(state before the aggregation, state with the plain averages) to the next state."""

MOMENTS = "server_optimizer"
"""Under which name of the server's own state the moments are kept."""
TAU = 1e-3
"""FedAdam's τ, the adaptivity the paper found best over all of its tasks."""


def optimizer(name: str, *, learning_rate: float, betas: tuple[float, float]) -> ServerOptimizer:
    """(state before the round, state with the plain averages) to the state the server's optimiser makes of them."""
    first, second = betas

    def step(before: ServerState, after: ServerState) -> ServerState:
        kept = before.own.get(MOMENTS, {})
        memory: dict[str, dict[str, Tensor]] = {kind: dict(kept.get(kind, {})) for kind in ("first", "second")}
        shared: dict[Key, Tensor] = dict(after.shared)
        for key, changed in after.deliveries.shared.items():
            if changed != after.round or key not in before.shared:
                continue
            old, delta = before.shared[key], after.shared[key] - before.shared[key]
            m = memory["first"].get(key_name(key), torch.zeros_like(delta))
            if name == "fedavgm":
                memory["first"][key_name(key)] = m = first * m + delta
                shared[key] = old + learning_rate * m
                continue
            v = memory["second"].get(key_name(key), torch.zeros_like(delta))
            memory["first"][key_name(key)] = m = first * m + (1 - first) * delta
            memory["second"][key_name(key)] = v = second * v + (1 - second) * delta**2
            shared[key] = old + learning_rate * m / (v.sqrt() + TAU)
        return after.with_(
            shared=shared, own={**after.own, MOMENTS: {kind: kept for kind, kept in memory.items() if kept}}
        )

    return step
