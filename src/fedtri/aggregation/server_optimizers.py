"""The server as an optimiser: the average's move is a gradient, followed by momentum or by Adam.

Δ = average − what was shared before. FedAvgM (arXiv:1909.06335): v ← β₁v + Δ, shared ← before + ηv. FedAdam
(arXiv:2003.00295): m ← β₁m + (1 − β₁)Δ, v ← β₂v + (1 − β₂)Δ², shared ← before + ηm / (√v + τ). A tensor that is
averaged for the first time has no Δ yet, as the server never held what clients started from: it is shared as it is.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from fedtri.adapters.layout import Key
from fedtri.state import ServerState

TAU = 1e-3
"""FedAdam's τ, the adaptivity the paper found best over all of its tasks."""


def optimizer(
    name: str, *, learning_rate: float, betas: tuple[float, float]
) -> Callable[[ServerState, ServerState], ServerState]:
    """(state before the round, state with the plain averages) to the state the server's optimiser makes of them."""
    first, second = betas

    def step(before: ServerState, after: ServerState) -> ServerState:
        memory = {kind: dict(before.memory.get(kind, {})) for kind in ("first", "second")}
        shared: dict[Key, Tensor] = dict(after.shared)
        for key, changed in after.changed.items():
            if changed != after.round or key not in before.shared:
                continue
            old, delta = before.shared[key], after.shared[key] - before.shared[key]
            m = memory["first"].get(key, torch.zeros_like(delta))
            if name == "fedavgm":
                memory["first"][key] = m = first * m + delta
                shared[key] = old + learning_rate * m
                continue
            v = memory["second"].get(key, torch.zeros_like(delta))
            memory["first"][key] = m = first * m + (1 - first) * delta
            memory["second"][key] = v = second * v + (1 - second) * delta**2
            shared[key] = old + learning_rate * m / (v.sqrt() + TAU)
        return after.with_(shared=shared, memory={kind: kept for kind, kept in memory.items() if kept})

    return step
