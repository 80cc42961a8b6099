"""What a run shows while it goes on: a live bar on a terminal, plain lines elsewhere. And the tables of its results."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from fedtri.config import Config
from fedtri.metrics import Phase
from fedtri.report.names import amount

SHARES: dict[Phase, tuple[float, float]] = {
    "basis": (0.0, 0.05), "sketch": (0.05, 0.1), "train": (0.1, 0.8), "evaluate": (0.8, 1.0),
}  # fmt: skip
"""The part of the bar that each phase fills, as shares of a round."""
WORDS: dict[Phase, str] = {
    "basis": "taking gradients of",
    "sketch": "sketching",
    "train": "training",
    "evaluate": "evaluating",
}


class Display(Protocol):
    """Is told of phases, steps and rounds."""

    def phase(self, round: int, phase: Phase, clients: Sequence[str]) -> None:
        """A phase of a round (counted from 0) begins with these clients."""
        ...

    def step(self, client: str, step: int, loss: float) -> None:
        """A client has taken a step (counted from 1), whose minibatch had this loss."""
        ...

    def round(self, line: Mapping[str, Any]) -> None:
        """A round ended; its line of rounds.jsonl."""
        ...


def describe(line: Mapping[str, Any], rounds: int) -> str:
    """One round in one line of text."""
    parts = [f"round {line['round']}/{rounds}", f"loss {line['loss']:.3f}"]
    for name, key in (("accuracy", "accuracy"), ("local", "accuracy_local")):
        if (value := line.get(key)) is not None:
            parts.append(f"{name} {value['mean']:.3f} ({value['worst']:.3f} to {value['best']:.3f})")
    for name, value in line.get("metrics", {}).items():
        parts.append(f"{name.replace('_', ' ')} {value['mean']:.3f}")
    up, down = (sum(line["bytes"][way].values()) for way in ("up", "down"))
    parts += [f"up {amount(up)}", f"down {amount(down)}", f"{sum(line['seconds'].values()):.1f} s"]
    return "  ".join(parts)


@contextmanager
def display(console: Console, config: Config, lines: Sequence[Mapping[str, Any]] = ()) -> Iterator[Display]:
    """A live display on a terminal, plain lines otherwise; `lines` are the rounds that are done already."""
    if not console.is_terminal:
        yield _Plain(console, config.rounds, len(lines))
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=10),
        TextColumn("{task.fields[status]}"),
        TextColumn("{task.fields[result]}"),
        TimeRemainingColumn(compact=True),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        yield _Live(progress, config, lines)


class _Plain:
    def __init__(self, console: Console, rounds: int, start: int) -> None:
        self.console, self.rounds, self.start = console, rounds, start
        self.began = time.monotonic()

    def phase(self, round: int, phase: Phase, clients: Sequence[str]) -> None:
        if phase == "sketch":
            self.console.print(f"sketching the data of {len(clients)} clients", highlight=False)
        if phase == "basis":
            self.console.print(f"a basis from the gradients of {len(clients)} clients", highlight=False)

    def step(self, client: str, step: int, loss: float) -> None:
        pass

    def round(self, line: Mapping[str, Any]) -> None:
        done = line["round"] - self.start
        left = (time.monotonic() - self.began) / done * (self.rounds - line["round"])
        more = "" if line["round"] == self.rounds else f"  {left:.0f} s left"
        self.console.print(f"{describe(line, self.rounds)}{more}", soft_wrap=True, highlight=False)


class _Live:
    def __init__(self, progress: Progress, config: Config, lines: Sequence[Mapping[str, Any]]) -> None:
        self.progress, self.rounds, self.steps = progress, config.rounds, config.steps
        self.bar = progress.add_task(
            "loading model and data", total=config.rounds, completed=len(lines), status="", result=""
        )
        self.sent = sum(_bytes(line) for line in lines)
        self.current, self.clients, self.heard = len(lines), 0, 0
        self.begun: set[str] = set()

    def phase(self, round: int, phase: Phase, clients: Sequence[str]) -> None:
        self.current, self.clients = round, len(clients)
        self.heard, self.begun = 0, set()
        self.progress.update(
            self.bar,
            description=f"round {self.current + 1}/{self.rounds}",
            completed=self.current + SHARES[phase][0],
            status=f"{WORDS[phase]} {len(clients)} clients",
        )

    def step(self, client: str, step: int, loss: float) -> None:
        self.heard += 1
        self.begun.add(client)
        begin, end = SHARES["train"]
        share = min(self.heard / (self.steps or float("inf")) / self.clients, 1.0)
        of = f"/{self.steps}" if self.steps else ""
        self.progress.update(
            self.bar,
            completed=self.current + begin + (end - begin) * share,
            status=f"client {len(self.begun)}/{self.clients}  step {step}{of}  loss {loss:.3f}",
        )

    def round(self, line: Mapping[str, Any]) -> None:
        self.sent += _bytes(line)
        parts = [f"acc {line['accuracy']['mean']:.3f}"] if line.get("accuracy") else []
        self.progress.update(self.bar, completed=line["round"], result="  ".join([*parts, amount(self.sent)]))
        self.progress.console.print(describe(line, self.rounds), highlight=False, soft_wrap=True)


def results(summaries: Sequence[Mapping[str, Any]]) -> Table:
    """One row per run: the clients' accuracy, the bytes that a client sends and receives in a round, and seconds.

    Beside the accuracy stands what guessing the largest class scores; the test loss, where no run predicts a class.
    """
    yardstick = "guess" if any(summary["guess"] is not None for summary in summaries) else "loss"
    table = Table(
        title="accuracy over clients on their own test examples; bytes per client and round",
        title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True,
    )  # fmt: skip
    for heading in ("method", "rounds", "clients", "mean", "worst", "best", yardstick, "up", "down", "seconds"):
        table.add_column(heading, justify="left" if heading == "method" else "right", no_wrap=True)
    for summary in summaries:
        score = summary["accuracy"]
        values = ["-"] * 3 if score is None else [f"{score[k]:.3f}" for k in ("mean", "worst", "best")]
        against = summary["guess"] if yardstick == "guess" else (summary["test_loss"] or {}).get("mean")
        table.add_row(
            summary["method"], str(summary["rounds"]), str(summary["clients"]), *values,
            "-" if against is None else f"{against:.3f}",
            f"{summary['bytes']['up_per_client_round']:,}", f"{summary['bytes']['down_per_client_round']:,}",
            f"{summary['seconds']['total']:.0f}",
        )  # fmt: skip
    return table


def clients(summary: Mapping[str, Any], most: int = 20) -> Table:
    """One row per client: examples, what guessing its largest class scores, accuracy before and after aggregation."""
    among = list(summary["client_table"].items())
    rest = f" (the first {most} of {len(among)})" if len(among) > most else ""
    table = Table(
        title=f"{summary['method']}: each client{rest}",
        title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True,
    )  # fmt: skip
    for heading in ("client", "train", "test", "largest class", "guess", "local", "aggregated"):
        table.add_column(heading, justify="left" if heading in ("client", "largest class") else "right")
    after = (summary["accuracy"] or {}).get("clients", {})
    local = (summary["accuracy_local"] or {}).get("clients", {})
    for client, about in among[:most]:
        counts = about["labels"]
        largest = summary["labels"][counts.index(max(counts))] if counts else "-"
        table.add_row(
            client, str(about["train"]), str(about["test"]), largest,
            "-" if about["guess"] is None else f"{about['guess']:.3f}",
            *(f"{scores[client]:.3f}" if client in scores else "-" for scores in (local, after)),
        )  # fmt: skip
    return table


def _bytes(line: Mapping[str, Any]) -> int:
    return sum(sum(line["bytes"][way].values()) for way in ("up", "down"))
