"""The round loop: sketch newcomers, train, aggregate, deliver and evaluate; one line and one checkpoint a round."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedtri.aggregation import fidelity
from fedtri.errors import FedtriError
from fedtri.federation import server
from fedtri.messages import POOLED, Answer, Failure, Phase, Transport
from fedtri.method import Method
from fedtri.state import ServerState

LOGGED_CLIENTS = 100
OWN_METRICS = {"loss", "accuracy", "train_loss", "validation_loss", "loss_personal", "accuracy_personal"}
"""Those that have a place of their own in a line of rounds.jsonl."""
LOWER_IS_BETTER = {"perplexity"}


@dataclass(frozen=True)
class Schedule:
    """How long a federation runs and who takes part."""

    rounds: int
    fraction: float = 1.0
    seed: int = 0
    evaluate: bool = True
    patience: int | None = None
    """Stop when the mean validation loss has not improved for this many rounds."""
    quorum: int = 1
    """Usable replies without which a round is not closed."""
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
    expected: server.Expectation,
    schedule: Schedule,
    *,
    state: ServerState | None = None,
    history: Sequence[Mapping[str, Any]] = (),
    on_phase: Callable[[int, Phase, Sequence[str]], None] = lambda round, phase, clients: None,
) -> Iterator[Progress]:
    """Run the rounds that are left after `state`; `history` holds the lines of the rounds before it."""
    state = (state or ServerState()).with_(scales=expected.scales)
    lines, missed = list(history), 0
    record = _Round(method, transport, on_phase, state.round)
    while state.round < schedule.rounds and not _enough(lines, schedule.patience):
        clients = transport.clients()
        record = record if missed else _Round(method, transport, on_phase, state.round)
        chosen = server.sample(clients, schedule.fraction, state.round, schedule.seed)
        if method.welcome is not None and (new := [c for c in chosen if c not in state.sketches]):
            state = server.sketched(method, state, [a.reply for a in record.ask(state, new, "sketch")])
        ready = [c for c in chosen if c in state.sketches] if method.welcome is not None else chosen
        trained = record.ask(state, [POOLED] if method.plan(state.round).pooled else ready, "train")
        began = time.perf_counter()
        replies, refused = server.accept([a.reply for a in trained], method.plan(state.round).up, expected)
        if len(replies) < schedule.quorum:
            missed += 1
            if missed >= schedule.attempts:
                raise FedtriError(record.shortage(len(replies), schedule.quorum, refused))
            continue
        missed = 0
        state = server.delivered(state, [a.reply.client for a in trained])
        before, state = state, server.server_step(method, state, replies)
        more = matrices(state) | fidelity.logged(before, state, replies)
        record.seconds["aggregate"] += time.perf_counter() - began
        last = state.round >= schedule.rounds
        after: list[Answer] = []
        if schedule.evaluate or last:
            after = record.ask(state, clients if last else chosen, "evaluate")
            state = server.delivered(state, [a.reply.client for a in after])
        line = record.line(chosen, trained, after, refused) | more
        if not last and _enough([*lines, line], schedule.patience) and len(chosen) < len(clients):
            rest = record.ask(state, sorted(set(clients) - set(chosen)), "evaluate")
            state = server.delivered(state, [a.reply.client for a in rest])
            line = record.line(chosen, trained, after + rest, refused) | more
        lines.append(line)
        yield Progress(state.round, line, state, last or _enough(lines, schedule.patience))


class _Round:
    """One round's exchanges, with their bytes and seconds."""

    def __init__(
        self,
        method: Method,
        transport: Transport,
        on_phase: Callable[[int, Phase, Sequence[str]], None],
        round: int,
    ) -> None:
        self.method, self.transport, self.on_phase, self.round = method, transport, on_phase, round
        self.up: dict[str, int] = {}
        self.down: dict[str, int] = {}
        self.sketch: dict[str, int] = {}
        self.latency: dict[str, dict[str, float]] = {}
        self.failed: dict[str, str] = {}
        self.refused: list[str] = []
        self.retries: dict[str, int] = {}
        self.seconds = {"sketch": 0.0, "train": 0.0, "aggregate": 0.0, "evaluate": 0.0}

    def ask(self, state: ServerState, clients: Sequence[str], phase: Phase) -> list[Answer]:
        self.on_phase(self.round, phase, clients)
        began = time.perf_counter()
        found = self.transport.exchange(server.requests(self.method, state, clients, state.round, phase))
        self.seconds[phase] += time.perf_counter() - began
        answers = [one for one in found if isinstance(one, Answer)]
        for answer in answers:
            client = answer.reply.client
            up = self.sketch if phase == "sketch" else self.up
            up[client] = up.get(client, 0) + answer.up
            self.down[client] = self.down.get(client, 0) + answer.down
            if answer.seconds is not None:
                self.latency.setdefault(client, {})[phase] = round(answer.seconds, 3)
            self._asked_again(client, answer.retries)
        for failure in (one for one in found if isinstance(one, Failure)):
            if failure.refused:
                self.refused.append(failure.reason)
            else:
                self.failed[failure.client] = failure.reason
            self._asked_again(failure.client, failure.retries)
        return sorted(answers, key=lambda answer: answer.reply.client)

    def _asked_again(self, client: str, times: int) -> None:
        if times:
            self.retries[client] = self.retries.get(client, 0) + times

    def shortage(self, usable: int, quorum: int, refused: Sequence[str]) -> str:
        """Why the round cannot be closed."""
        what = f"{usable} replies can be used, expected at least {quorum}" if usable else "no reply can be used"
        reasons = [*refused, *self.refused, *self.failed.values()]
        return "; ".join([f"round {self.round + 1}: {what}", *reasons[:3]])

    def line(
        self,
        chosen: Sequence[str],
        trained: Sequence[Answer],
        after: Sequence[Answer],
        refused: Sequence[str],
    ) -> dict[str, Any]:
        train_loss = metric(trained, "train_loss")
        line: dict[str, Any] = {
            "round": self.round + 1,
            "clients": list(chosen),
            "loss": sum(train_loss.values()) / len(train_loss) if train_loss else None,
            "accuracy": spread(metric(after, "accuracy")),
            "accuracy_local": spread(metric(trained, "accuracy")),
            **({"accuracy_personal": spread(personal)} if (personal := metric(trained, "accuracy_personal")) else {}),
            "test_loss": spread(metric(after, "loss"), higher_is_better=False),
            "test_loss_local": spread(metric(trained, "loss"), higher_is_better=False),
            "bytes": {"up": self.up, "down": self.down, **({"sketch": self.sketch} if self.sketch else {})},
            "seconds": {name: round(value, 4) for name, value in self.seconds.items()},
        }
        if more := further_metrics(trained, after):
            line["metrics"] = more
        if validation := metric(after, "validation_loss"):
            line["validation_loss"] = sum(validation.values()) / len(validation)
        if refused := [*refused, *self.refused]:
            line["refused"] = refused
        for name in ("failed", "latency", "retries"):
            if said := getattr(self, name):
                line[name] = said
        return line


def metric(answers: Sequence[Answer], name: str) -> dict[str, float]:
    """This metric of each client that reported it."""
    return {a.reply.client: a.reply.metrics[name] for a in answers if name in a.reply.metrics}


def further_metrics(trained: Sequence[Answer], after: Sequence[Answer]) -> dict[str, Any]:
    """What clients report beyond losses and accuracy: NAME after aggregation, NAME_local after local training."""
    table = {}
    for answers, suffix in ((after, ""), (trained, "_local")):
        names = sorted({name for answer in answers for name in answer.reply.metrics} - OWN_METRICS)
        for name in names:
            lower = name.removesuffix("_personal") in LOWER_IS_BETTER
            table[name + suffix] = spread(metric(answers, name), higher_is_better=not lower)
    return table


def spread(values: Mapping[str, float], higher_is_better: bool = True) -> dict[str, Any] | None:
    """Mean, worst, best, and each client's value; None where nobody reported."""
    if not values:
        return None
    low, high = min(values.values()), max(values.values())
    worst, best = (low, high) if higher_is_better else (high, low)
    return {"mean": sum(values.values()) / len(values), "worst": worst, "best": best, "clients": dict(values)}


def matrices(state: ServerState) -> dict[str, Any]:
    """The similarity and mixing matrices of a round for its log line, up to 100 clients."""
    found = state.similarity
    if found is None or len(found.clients) > LOGGED_CLIENTS:
        return {}
    rows = {name: [[round(x, 4) for x in row] for row in m.tolist()] for name, m in found.matrices.items()}
    return {"similarity": {"clients": list(found.clients), **rows}}


def _enough(lines: Sequence[Mapping[str, Any]], patience: int | None) -> bool:
    """Whether the best validation loss lies `patience` rounds back."""
    losses = [line["validation_loss"] for line in lines if "validation_loss" in line]
    return patience is not None and len(losses) > patience and min(losses[:-patience]) <= min(losses[-patience:])
