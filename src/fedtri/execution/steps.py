"""One client's optimiser: the proximal pull, the clipped gradient, a step of AdamW, the learning rate's schedule.

With θ what learns and g the gradient of a minibatch's mean loss, a step is

    g ← g + μ (θ − towards)          the proximal term's gradient, where there is one
    g ← g · min(1, clip / ‖g‖)       over all that learns of this client
    θ ← AdamW(θ, g)                  at the learning rate of θ's factor
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fedtri.adapters.layout import Key
from fedtri.execution.executor import Optimization, Training, minibatches


@dataclass(frozen=True)
class Steps:
    """What one client's steps of a round need beside its minibatches; made by `steps`."""

    parameters: list[nn.Parameter]
    towards: list[Tensor]
    """What the proximal term pulls to, one for each parameter; empty where nothing pulls."""
    proximal: float
    clip: float | None
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler

    def take(self) -> None:
        """One step along the gradients that the parameters have; afterwards they have none."""
        for parameter in self.parameters:
            if parameter.grad is None:  # a part of the model that this task does not use
                parameter.grad = torch.zeros_like(parameter)
        for parameter, towards in zip(self.parameters, self.towards, strict=False):
            assert parameter.grad is not None
            parameter.grad.add_(parameter.detach() - towards, alpha=self.proximal)
        if self.clip is not None:
            nn.utils.clip_grad_norm_(self.parameters, self.clip)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()


def steps(learning: Mapping[Key, nn.Parameter], work: Training, how: Optimization) -> Steps:
    """The optimiser of one client's round over these parameters, which hold what it starts with."""
    parameters = list(learning.values())
    given = work.towards or {}
    towards = [
        given[key].to(parameter) if key in given else parameter.detach().clone() for key, parameter in learning.items()
    ]
    optimizer = torch.optim.AdamW(
        _groups(learning, how), lr=how.learning_rate, betas=how.betas, weight_decay=how.weight_decay, fused=True
    )
    return Steps(
        parameters,
        towards if work.proximal else [],
        work.proximal,
        how.clip,
        optimizer,
        _schedule(optimizer, work, how),
    )


def _groups(learning: Mapping[Key, nn.Parameter], how: Optimization) -> list[dict[str, Any]]:
    """AdamW's parameter groups: one for each learning rate, with the parameters of the factors that have it."""
    groups: dict[float, list[nn.Parameter]] = {}
    for key, parameter in learning.items():
        groups.setdefault(how.learning_rates.get(key.factor, how.learning_rate), []).append(parameter)
    return [{"params": parameters, "lr": rate} for rate, parameters in groups.items()]


def _schedule(
    optimizer: torch.optim.Optimizer, work: Training, how: Optimization
) -> torch.optim.lr_scheduler.LRScheduler:
    """The learning rate's schedule over one round."""
    if how.schedule == "constant":
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1)
    from transformers.optimization import get_scheduler  # it imports PEFT, 2 s that a client's every call would pay

    total = sum(1 for _ in minibatches(work.rows, how, work.seed))
    return get_scheduler(how.schedule, optimizer, how.warmup, total)
