"""FedALT: a client's own adapter learns and is never overwritten; beside it lies the others' mean. arXiv:2503.11880.

y = W0 x + s (1 − w) B A x + s w b a x, with a and b the means of the other clients' A and B: the rest of the world. It
comes down frozen. In the paper w is a gate: a softmax of a linear layer of x. Here w is one number for all, the option
`mix`, because a gate is no adapter: neither PEFT nor merged weights could hold it.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fedtri.adapters.layout import Factors, Key, key_name, only, parse_key
from fedtri.aggregation import means
from fedtri.errors import FedtriError
from fedtri.messages import Reply
from fedtri.method import AdapterSpec, Method, Paper, Plan
from fedtri.state import ServerState, Tree

PAPER = Paper(
    "FedALT",
    "FedALT: Federated Fine-Tuning through Adaptive Local Training with Rest-of-World LoRA",
    2025,
    "https://arxiv.org/abs/2503.11880",
)


def fedalt(*, mix: float = 0.5) -> Method:
    """Learns A, B and H, sends A and B; receives a and b, the mean of the other clients'; H stays home.

    mix: w in [0, 1), how much the rest of the world weighs. Before it first arrives, a client's own adapter weighs 1.
    """
    if not 0 <= mix < 1:
        raise FedtriError(f"method_options.mix: expected a number in [0, 1), got {mix}")
    plan = Plan.of(train="ABH", up="AB", down="ab")

    def aggregate(state: ServerState, replies: Sequence[Reply]) -> ServerState:
        """Who missed this round counts with what it last sent."""
        seen = {**state.own.get("seen", {}), **{reply.client: _kept(reply) for reply in replies}}
        counts = {client: float(one["examples"]) for client, one in seen.items()}
        everyone, total = _sum(seen, counts), sum(counts.values())

        def others(client: str) -> dict[Key, Tensor]:
            """The mean without this client; its own pair where there is no other."""
            own, count = seen[client]["sent"], counts[client]
            if len(seen) == 1:
                return {_second(name): value for name, value in own.items()}
            return {
                _second(name): ((everyone[name] - count * value.double()) / (total - count)).to(value.dtype)
                for name, value in own.items()
            }

        # to a client that has sent nothing yet, everyone is an other
        last = seen[replies[0].client]["sent"]
        state = means.share(state, {_second(name): (everyone[name] / total).to(last[name]) for name in last})
        state = means.personalise(state, {client: others(client) for client in seen})
        return state.with_(own={**state.own, "seen": seen})

    def receive(own: Factors, down: Factors, fresh: Callable[[], Factors]) -> Factors:
        """C holds 1 − w, and b is multiplied by w, so that the layer need not know of either."""
        mixed = {key: mix * value if key.factor == "b" else value for key, value in down.items()}
        cores = {
            key: (1 - mix) * torch.eye(len(value), dtype=value.dtype)
            for key, value in own.items() if key.factor == "C" and Key(key.layer, "b") in down
        }  # fmt: skip
        return {**own, **cores, **mixed}

    return Method(
        "fedalt",
        PAPER,
        lambda _: plan,
        aggregate,
        receive=receive,
        adapter=AdapterSpec(extra="ab"),
        weights="uniform",
    )


def _kept(reply: Reply) -> dict[str, Any]:
    """What the server remembers of a client."""
    sent = {key_name(key): value for key, value in only(reply.up, frozenset("AB")).items()}
    return {"examples": torch.tensor(reply.num_examples), "sent": sent}


def _sum(seen: Tree, counts: Mapping[str, float]) -> dict[str, Tensor]:
    """Σ n_k θ_k of every tensor, in float64, in the order of the clients' names."""
    result: dict[str, Tensor] = {}
    for client in sorted(seen):
        for name, value in seen[client]["sent"].items():
            result[name] = result.get(name, torch.zeros((), dtype=torch.float64)) + counts[client] * value.double()
    return result


def _second(name: str) -> Key:
    """The tensor of the second adapter in which this one of the first arrives at the others."""
    layer, factor = parse_key(name)
    return Key(layer, factor.lower())
