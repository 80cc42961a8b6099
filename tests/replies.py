"""Replies with numbers small enough for a hand, and one step of the server on them: one layer, "w"."""

import torch
from torch import Tensor

from fedtri.adapters.layout import Factors, Key
from fedtri.federation import server
from fedtri.messages import Reply
from fedtri.methods import build
from fedtri.state import Scales, ServerState

DOUBLE = {"dtype": torch.float64}
ALPHA = 6.0


def reply(client: str, examples: int = 1, **factors: list[list[float]]) -> Reply:
    up = {Key("w", name): torch.tensor(value, **DOUBLE) for name, value in factors.items()}
    return Reply(client, 0, up, examples, {})


def step(
    method: str, *replies: Reply, state: ServerState | None = None, weights: str = "default", **options: object
) -> ServerState:
    """One aggregation of these replies, each at the rank that it has."""
    ranks = {r.client: next(v.shape[k.factor == "B"] for k, v in r.up.items()) for r in replies}
    state = state or ServerState(scales=Scales(ALPHA, ranks))
    return server.server_step(build(method, options, weights=weights), state, replies)


def product(factors: Factors) -> Tensor:
    return factors[Key("w", "B")] @ factors[Key("w", "A")]


def drawn(seed: int, ranks: tuple[int, ...] = (2, 2, 2), d_in: int = 5, d_out: int = 4) -> list[Reply]:
    rng = torch.Generator().manual_seed(seed)
    return [
        Reply(
            f"c{i}",
            0,
            {
                Key("w", "A"): torch.randn(r, d_in, generator=rng, **DOUBLE),
                Key("w", "B"): torch.randn(d_out, r, generator=rng, **DOUBLE),
            },
            i + 1,
            {},
        )
        for i, r in enumerate(ranks)
    ]
