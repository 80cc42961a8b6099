"""The record of one round: who was asked, who answered or failed, bytes and seconds, and its line of rounds.jsonl."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fedtri.messages import Answer, Failure, Request, Transport
from fedtri.metrics import (
    ACCURACY,
    IN_A_LINE,
    LOCAL,
    LOSS,
    PERSONAL,
    STAGES,
    TRAIN_LOSS,
    VALIDATION_LOSS,
    Phase,
    spread,
)  # fmt: skip
from fedtri.state import ServerState

LOGGED_CLIENTS = 100
"""Matrices over more clients than this are left out of the line."""
OnPhase = Callable[[int, Phase, Sequence[str]], None]
"""(round counted from 0, phase, the clients that are asked)"""


@dataclass
class Record:
    """What happened in one round so far. Bytes, latency and retries are by client."""

    transport: Transport
    round: int
    """Counted from 0."""
    on_phase: OnPhase
    up: dict[str, int] = field(default_factory=dict)
    down: dict[str, int] = field(default_factory=dict)
    basis: dict[str, int] = field(default_factory=dict)
    sketch: dict[str, int] = field(default_factory=dict)
    latency: dict[str, dict[str, float]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    refused: list[str] = field(default_factory=list)
    retries: dict[str, int] = field(default_factory=dict)
    behind: list[str] = field(default_factory=list)
    """Who answered the last phase that it has lost what it was sent, and is to be asked again."""
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))

    def ask(self, requests: Sequence[Request], phase: Phase) -> list[Answer]:
        """Exchange the requests of one phase; the answers in the order of the clients' names."""
        self.on_phase(self.round, phase, [request.client for request in requests])
        began = time.perf_counter()
        found = self.transport.exchange(requests)
        self.seconds[phase] += time.perf_counter() - began
        answers = [one for one in found if isinstance(one, Answer)]
        for answer in answers:
            self._answered(answer, phase)
        before, self.behind = self.behind, []
        for failure in (one for one in found if isinstance(one, Failure)):
            if failure.behind and failure.client not in before:
                self.behind.append(failure.client)
                self._asked_again(failure.client, 1)
            else:
                self._failed(failure)
        return sorted(answers, key=lambda answer: answer.reply.client)

    def shortage(self, usable: int, quorum: int) -> str:
        """Why the round cannot be closed, in one line."""
        what = f"{usable} replies can be used, expected at least {quorum}" if usable else "no reply can be used"
        reasons = [*self.refused, *self.failed.values()]
        return "; ".join([f"round {self.round + 1}: {what}", *reasons[:3]])

    def line(
        self, chosen: Sequence[str], trained: Sequence[Answer], evaluated: Sequence[Answer], state: ServerState
    ) -> dict[str, Any]:
        """The round's line of rounds.jsonl.

        Args:
            chosen: The clients that were drawn to take part.
            trained: Their answers after local training.
            evaluated: The answers of those who were scored after aggregation.
            state: The server's state after the round.
        """
        train_loss = metric(trained, TRAIN_LOSS)
        line: dict[str, Any] = {
            "round": self.round + 1,
            "clients": list(chosen),
            "loss": _mean(train_loss),
            "accuracy": spread(ACCURACY, metric(evaluated, ACCURACY)),
            "accuracy_local": spread(ACCURACY, metric(trained, ACCURACY)),
            "accuracy_personal": spread(ACCURACY, metric(trained, ACCURACY + PERSONAL)),
            "test_loss": spread(LOSS, metric(evaluated, LOSS)),
            "test_loss_local": spread(LOSS, metric(trained, LOSS)),
            "bytes": {"up": self.up, "down": self.down} | self._once(),
            "seconds": {name: round(value, 4) for name, value in self.seconds.items()},
        }
        further = {
            "metrics": further_metrics(trained, evaluated),
            "validation_loss": _mean(metric(evaluated, VALIDATION_LOSS)),
            "refused": self.refused,
            "failed": self.failed,
            "latency": self.latency,
            "retries": self.retries,
            "similarity": matrices(state),
        }
        if line["accuracy_personal"] is None:
            del line["accuracy_personal"]
        return line | {name: value for name, value in further.items() if value not in (None, {}, [])}

    def _once(self) -> dict[str, dict[str, int]]:
        """The bytes up of what a client sends once in a run, where any did in this round."""
        return {name: table for name, table in (("basis", self.basis), ("sketch", self.sketch)) if table}

    def _answered(self, answer: Answer, phase: Phase) -> None:
        client, up = answer.reply.client, {"basis": self.basis, "sketch": self.sketch}.get(phase, self.up)
        up[client] = up.get(client, 0) + answer.up
        self.down[client] = self.down.get(client, 0) + answer.down
        if answer.seconds is not None:
            self.latency.setdefault(client, {})[phase] = round(answer.seconds, 3)
        self._asked_again(client, answer.retries)

    def _failed(self, failure: Failure) -> None:
        if failure.refused:
            self.refused.append(failure.reason)
        else:
            self.failed[failure.client] = failure.reason
        self._asked_again(failure.client, failure.retries)

    def _asked_again(self, client: str, times: int) -> None:
        if times:
            self.retries[client] = self.retries.get(client, 0) + times


def metric(answers: Sequence[Answer], name: str) -> dict[str, float]:
    """This metric of each client that reported it."""
    return {a.reply.client: a.reply.metrics[name] for a in answers if name in a.reply.metrics}


def further_metrics(trained: Sequence[Answer], evaluated: Sequence[Answer]) -> dict[str, Any]:
    """What clients report beyond losses and accuracy: NAME after aggregation, NAME_local after local training."""
    table = {}
    for answers, suffix in ((evaluated, ""), (trained, LOCAL)):
        for name in sorted({name for answer in answers for name in answer.reply.metrics} - IN_A_LINE):
            table[name + suffix] = spread(name, metric(answers, name))
    return table


def matrices(state: ServerState) -> dict[str, Any]:
    """The similarity and mixing matrices that the method found in this round; empty where there are none, or where they
    are of too many clients.
    """
    found = state.similarity
    if found is None or len(found.clients) > LOGGED_CLIENTS:
        return {}
    rows = {name: [[round(x, 4) for x in row] for row in m.tolist()] for name, m in found.matrices.items()}
    return {"clients": list(found.clients), **rows}


def _mean(values: Mapping[str, float]) -> float | None:
    return sum(values.values()) / len(values) if values else None
