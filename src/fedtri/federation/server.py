"""The server's half of a round: each client's own request, and one step from its replies to the next state."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from fedtri.adapters.layout import Factors, Key, Layout, only
from fedtri.aggregation import bases, means, pairs
from fedtri.messages import Held, Reply, Request
from fedtri.method import Method
from fedtri.metrics import ONCE, Phase
from fedtri.seeds import derive
from fedtri.state import Scales, ServerState


@dataclass(frozen=True)
class Expectation:
    """What a valid reply looks like: the layout, each client's rank, and how large a tensor may be."""

    layout: Layout
    scales: Scales
    norm_bound: float = 1e4
    """The largest Frobenius norm a tensor of a reply may have."""
    gradient_factors: int = 4
    """How many leading factors of its gradient a client sends for a basis, at most its rank."""

    @property
    def of_gradients(self) -> "Expectation":
        """The same for what clients send of their gradients: B (d_out, factors) and A (factors, d_in)."""
        ranks = {client: min(rank, self.gradient_factors) for client, rank in self.scales.ranks.items()}
        return replace(self, scales=replace(self.scales, ranks=ranks))

    def shapes(self, client: str, kinds: frozenset[str]) -> dict[Key, tuple[int, ...]]:
        """The shapes of the tensors of these factors that this client has."""
        rank = self.scales.ranks[client]
        return {key: shape for key, shape in self.layout.shapes(rank).items() if key.factor in kinds}


def sample(clients: Sequence[str], fraction: float, round: int, seed: int) -> list[str]:
    """The clients that take part in a round: at least one, drawn without replacement, sorted."""
    count = max(1, round_half_up(fraction * len(clients)))
    rng = np.random.default_rng(derive(seed, "sample", round))
    return sorted(rng.choice(np.array(clients, dtype=object), size=count, replace=False))


def round_half_up(value: float) -> int:
    """0.5 rounds to 1, unlike Python's round."""
    return int(value + 0.5)


def requests(method: Method, state: ServerState, clients: Sequence[str], round: int, phase: Phase) -> list[Request]:
    """A request a client, carrying what changed for it since it was last sent anything."""
    if phase in ONCE:
        return [Request(phase, round, client, {}) for client in clients]
    up = method.plan(round).up if phase == "train" else frozenset[str]()
    return [
        Request(
            phase, round, client, downlink(method, state, client), state.held.get(client),
            only(values(state, client), up),
        )
        for client in clients
    ]  # fmt: skip


def values(state: ServerState, client: str) -> Factors:
    """The shared tensors, overridden by the client's personal ones, at its rank: all that it may be sent."""
    return pairs.cut({**state.shared, **state.personal.get(client, {})}, state.scales.ranks.get(client))


def downlink(method: Method, state: ServerState, client: str) -> Factors:
    """What a client does not have yet of the shared tensors, overridden by its personal ones."""
    have = state.deliveries.sent.get(client, -1)
    new = {key for key, changed in state.deliveries.shared.items() if changed > have}
    if state.deliveries.personal.get(client, have) > have:
        new |= state.personal[client].keys()
    down = {key: value for key, value in values(state, client).items() if key in new}
    return only(down, method.plan(state.round).down)


def delivered(state: ServerState, clients: Sequence[str], held: Mapping[str, Held] | None = None) -> ServerState:
    """The state after these clients were sent what was theirs; `held` says what some of them have of it."""
    sent = {**state.deliveries.sent, **dict.fromkeys(clients, state.round)}
    return state.with_(deliveries=replace(state.deliveries, sent=sent), held={**state.held, **(held or {})})


def forgotten(state: ServerState, clients: Sequence[str]) -> ServerState:
    """The state in which these clients, who lost what they were sent, have been sent nothing."""
    sent, held = (
        {client: value for client, value in table.items() if client not in clients}
        for table in (state.deliveries.sent, state.held)
    )
    return state.with_(deliveries=replace(state.deliveries, sent=sent), held=held)


def wants_basis(method: Method, state: ServerState) -> bool:
    """Whether the clients are to send their gradients first, from which the method's A (and B) are made."""
    return method.adapter.basis == "gradient" and not any(key.factor == "A" for key in state.deliveries.shared)


def based(method: Method, state: ServerState, replies: Sequence[Reply]) -> ServerState:
    """The state with the basis that these replies' gradients give, in whatever order they came, as everyone's."""
    ordered = sorted(replies, key=lambda reply: reply.client)
    rank = max(state.scales.ranks.values())
    return means.share(state, bases.pooled(ordered, method.adapter.from_basis, rank))


def sketched(method: Method, state: ServerState, replies: Sequence[Reply]) -> ServerState:
    """The state with newcomers' sketches, after the method has welcomed them."""
    new = {reply.client: reply.sketch for reply in sorted(replies, key=lambda r: r.client) if reply.sketch is not None}
    state = state.with_(sketches={**state.sketches, **new})
    return state if method.welcome is None else method.welcome(state)


def server_step(method: Method, state: ServerState, replies: Sequence[Reply]) -> ServerState:
    """The next state; the order of replies changes nothing, and without replies only the round counts on."""
    ordered = sorted(replies, key=lambda reply: reply.client)
    state = state.with_(round=state.round + 1)
    return method.aggregate(state, ordered) if ordered else state


def refuse(reply: Reply, up: frozenset[str], expected: Expectation) -> str | None:
    """Why a reply cannot be used, in one line, or None: keys, shapes, finiteness, norms, number of examples."""
    shapes = expected.shapes(reply.client, up)
    if missing := set(shapes) - set(reply.up):
        return f"{reply.client}: {len(missing)} expected tensors are missing, among them {min(missing)}"
    if extra := set(reply.up) - set(shapes):
        return f"{reply.client}: {len(extra)} tensors do not travel in this method, among them {min(extra)}"
    if reply.num_examples < 1:
        return f"{reply.client}: expected at least 1 training example, got {reply.num_examples}"
    for key, value in reply.up.items():
        if tuple(value.shape) != shapes[key]:
            return f"{reply.client}: {key.factor} of {key.layer} has shape {tuple(value.shape)}, expected {shapes[key]}"
        norm = float(torch.linalg.vector_norm(value.double()))
        if not norm <= expected.norm_bound:
            what = f"{reply.client}: {key.factor} of {key.layer}"
            return f"{what} has norm {norm:.3g}, expected a finite one up to {expected.norm_bound:g}"
    return None
