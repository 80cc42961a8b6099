"""The round loop: sketch newcomers, train, aggregate, deliver and evaluate; it yields a line and a state a round.

Before the first round all clients are asked for their gradients, where the method's basis is made of them.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedtri.aggregation import fidelity, means
from fedtri.errors import FedtriError
from fedtri.federation import server
from fedtri.federation.record import OnPhase, Record
from fedtri.messages import POOLED, Answer, Transport
from fedtri.method import Method
from fedtri.metrics import VALIDATION_LOSS, Phase
from fedtri.state import Scales, ServerState


@dataclass(frozen=True)
class Schedule:
    """How long a federation runs and who takes part."""

    rounds: int
    fraction: float = 1.0
    """The share of the clients that take part in a round."""
    seed: int = 0
    evaluate: bool = True
    """Whether every round ends with an evaluation; the last one always does."""
    patience: int | None = None
    """Stop when the mean validation loss has not improved for this many rounds."""
    quorum: int = 1
    """The replies that a round needs to close."""
    attempts: int = 1
    """How often a round that misses its quorum is tried before the run stops."""


@dataclass(frozen=True)
class Progress:
    """One finished round: its number from 1, its line for rounds.jsonl, and the server's state after it."""

    round: int
    line: Mapping[str, Any]
    state: ServerState
    last: bool


def run(
    method: Method,
    transport: Transport,
    scales: Scales,
    schedule: Schedule,
    *,
    state: ServerState | None = None,
    history: Sequence[Mapping[str, Any]] = (),
    on_phase: OnPhase = lambda round, phase, clients: None,
) -> Iterator[Progress]:
    """Run the rounds that are left.

    Args:
        method: What travels, and how replies become the next state.
        transport: Carries requests to clients; its answers are checked already.
        scales: Each client's rank and scale, which are not in a checkpoint.
        schedule: How many rounds, and who takes part.
        state: The state of an earlier run to go on from; None: from the beginning.
        history: The lines of the rounds before `state`.
        on_phase: Called before the clients of a phase are asked.

    Raises:
        FedtriError: Where a round misses its quorum as often as it may be tried.
    """
    state = (state or ServerState()).with_(scales=scales)
    lines, missed = list(history), 0
    record = Record(transport, state.round, on_phase)
    while state.round < schedule.rounds and not _enough(lines, schedule.patience):
        clients = transport.clients()
        if not missed:
            record = Record(transport, state.round, on_phase)
        chosen = server.sample(clients, schedule.fraction, state.round, schedule.seed)
        answers = list[Answer]()
        if server.wants_basis(method, state):
            state, answers = _ask(method, state, clients, "basis", record)
            if len(answers) >= schedule.quorum:
                state = server.based(method, state, [answer.reply for answer in answers])
        if not server.wants_basis(method, state):
            state = _welcomed(method, state, chosen, record)
            state, answers = _ask(method, state, _trainees(method, state, chosen), "train", record)
        if len(answers) < schedule.quorum:
            missed += 1
            if missed >= schedule.attempts:
                raise FedtriError(record.shortage(len(answers), schedule.quorum))
            continue
        trained, missed = answers, 0
        began = time.perf_counter()
        replies = [answer.reply for answer in trained]
        before = _delivered(state, trained)
        state = server.server_step(method, before, replies)
        lossless = fidelity.logged(before, state, means.counted(replies, method.weights))
        record.seconds["aggregate"] += time.perf_counter() - began
        last, evaluated = state.round >= schedule.rounds, list[Answer]()
        if schedule.evaluate or last:
            state, evaluated = _ask(method, state, clients if last else chosen, "evaluate", record)
            state = _delivered(state, evaluated)
        line = record.line(chosen, trained, evaluated, state) | lossless
        if not last and _enough([*lines, line], schedule.patience) and len(chosen) < len(clients):
            state, others = _ask(method, state, sorted(set(clients) - set(chosen)), "evaluate", record)
            state = _delivered(state, others)
            line = record.line(chosen, trained, evaluated + others, state) | lossless
        lines.append(line)
        yield Progress(state.round, line, state, last or _enough(lines, schedule.patience))


def _ask(
    method: Method, state: ServerState, clients: Sequence[str], phase: Phase, record: Record
) -> tuple[ServerState, list[Answer]]:
    """The answers to one phase; a client that has lost what it was sent is asked again, with all that it needs."""
    answers = record.ask(server.requests(method, state, clients, state.round, phase), phase)
    if behind := record.behind:
        state = server.forgotten(state, behind)
        answers += record.ask(server.requests(method, state, behind, state.round, phase), phase)
    return state, sorted(answers, key=lambda answer: answer.reply.client)


def _delivered(state: ServerState, answers: Sequence[Answer]) -> ServerState:
    """The state after these clients were sent what was theirs."""
    held = {answer.reply.client: answer.held for answer in answers if answer.held is not None}
    return server.delivered(state, [answer.reply.client for answer in answers], held)


def _welcomed(method: Method, state: ServerState, chosen: Sequence[str], record: Record) -> ServerState:
    """The state with the sketches of those who take part for the first time, where the method wants sketches."""
    if method.welcome is None or not (new := [client for client in chosen if client not in state.sketches]):
        return state
    state, answers = _ask(method, state, new, "sketch", record)
    return server.sketched(method, state, [answer.reply for answer in answers])


def _trainees(method: Method, state: ServerState, chosen: Sequence[str]) -> Sequence[str]:
    """Who trains: the pseudo-client with everyone's data, or the chosen, without those whose sketch is missing."""
    if method.plan(state.round).pooled:
        return [POOLED]
    return chosen if method.welcome is None else [client for client in chosen if client in state.sketches]


def _enough(lines: Sequence[Mapping[str, Any]], patience: int | None) -> bool:
    """Whether the best validation loss lies `patience` rounds back."""
    losses = [line[VALIDATION_LOSS] for line in lines if VALIDATION_LOSS in line]
    return patience is not None and len(losses) > patience and min(losses[:-patience]) <= min(losses[-patience:])
