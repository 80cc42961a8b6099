"""What a run shows while it goes: a live bar on a terminal, plain lines elsewhere; and the tables of its results."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table


class Display(Protocol):
    """Hears of phases, steps and rounds."""

    def phase(self, round: int, phase: str, clients: Sequence[str]) -> None:
        """A phase of a round (counted from 0) begins with these clients."""
        ...

    def step(self, step: int, loss: float) -> None:
        """The cohort took a step; its mean loss."""
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
    up, down = (sum(line["bytes"][way].values()) for way in ("up", "down"))
    parts += [f"up {amount(up)}", f"down {amount(down)}", f"{sum(line['seconds'].values()):.1f} s"]
    return "  ".join(parts)


@contextmanager
def display(console: Console, rounds: int, steps: int | None, start: int = 0) -> Iterator[Display]:
    """A live display on a terminal, plain lines otherwise."""
    if not console.is_terminal:
        yield _Plain(console, rounds, start)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[status]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        yield _Live(progress, rounds, steps, start)


class _Plain:
    def __init__(self, console: Console, rounds: int, start: int) -> None:
        self.console, self.rounds, self.start = console, rounds, start
        self.began = time.monotonic()

    def phase(self, round: int, phase: str, clients: Sequence[str]) -> None:
        if phase == "sketch":
            self.console.print(f"sketching the data of {len(clients)} clients")

    def step(self, step: int, loss: float) -> None:
        pass

    def round(self, line: Mapping[str, Any]) -> None:
        done = line["round"] - self.start
        left = (time.monotonic() - self.began) / done * (self.rounds - line["round"])
        self.console.print(f"{describe(line, self.rounds)}  {left:.0f} s left", soft_wrap=True, highlight=False)


class _Live:
    def __init__(self, progress: Progress, rounds: int, steps: int | None, start: int) -> None:
        self.progress, self.rounds, self.steps = progress, rounds, steps
        self.bar = progress.add_task("starting", total=rounds, completed=start, status="")
        self.current = start

    def phase(self, round: int, phase: str, clients: Sequence[str]) -> None:
        self.current = round
        words = {"sketch": "sketching", "train": "training", "evaluate": "evaluating"}[phase]
        self.progress.update(
            self.bar,
            description=f"round {min(round + 1, self.rounds)}/{self.rounds}",
            status=f"{words} {len(clients)} clients",
        )

    def step(self, step: int, loss: float) -> None:
        inside = step / self.steps if self.steps else 0.0
        self.progress.update(
            self.bar, completed=self.current + 0.8 * min(inside, 1.0), status=f"step {step}  loss {loss:.3f}"
        )

    def round(self, line: Mapping[str, Any]) -> None:
        self.progress.update(self.bar, completed=line["round"])
        self.progress.console.print(describe(line, self.rounds), highlight=False, soft_wrap=True)


def results(summaries: Sequence[Mapping[str, Any]]) -> Table:
    """One row a run: client accuracy, what guessing would score, bytes a client sends and receives a round, seconds."""
    table = Table(
        title="accuracy over clients, on each client's own test examples, after aggregation",
        title_justify="left",
    )
    for heading in (
        "method",
        "rounds",
        "clients",
        "mean",
        "worst",
        "best",
        "guess",
        "bytes up",
        "bytes down",
        "seconds",
    ):
        table.add_column(heading, justify="left" if heading == "method" else "right")
    for summary in summaries:
        score = summary["accuracy"]
        values = ["-"] * 3 if score is None else [f"{score[k]:.3f}" for k in ("mean", "worst", "best")]
        table.add_row(
            summary["method"], str(summary["rounds"]), str(summary["clients"]), *values, f"{summary['guess']:.3f}",
            f"{summary['bytes']['up_per_client_round']:,}", f"{summary['bytes']['down_per_client_round']:,}",
            f"{summary['seconds']['total']:.0f}",
        )  # fmt: skip
    return table


def clients(summary: Mapping[str, Any], most: int = 20) -> Table:
    """One row a client: examples, what guessing its largest class scores, accuracy before and after aggregation."""
    table = Table(title=f"{summary['method']}: each client", title_justify="left")
    for heading in ("client", "train", "test", "largest class", "guess", "local", "aggregated"):
        table.add_column(heading, justify="left" if heading in ("client", "largest class") else "right")
    after = (summary["accuracy"] or {}).get("clients", {})
    local = (summary["accuracy_local"] or {}).get("clients", {})
    for client, about in list(summary["client_table"].items())[:most]:
        counts = about["labels"]
        largest = summary["labels"][counts.index(max(counts))]
        table.add_row(
            client, str(about["train"]), str(about["test"]), largest, f"{about['guess']:.3f}",
            *(f"{scores[client]:.3f}" if client in scores else "-" for scores in (local, after)),
        )  # fmt: skip
    return table


def amount(count: float) -> str:
    """Bytes as people read them."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
