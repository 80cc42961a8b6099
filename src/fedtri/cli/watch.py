"""The terminal view of a run, running or finished, from its rounds.jsonl alone: works from any terminal, or by ssh."""

import fcntl
import math
import time
from pathlib import Path

from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from fedtri.metrics import STAGES
from fedtri.report import reading
from fedtri.report.names import NARROWEST_SPAN, amount, duration, share
from fedtri.report.reading import Run
from fedtri.storage import run_directory

ROWS = 12
BLOCKS = "▁▂▃▄▅▆▇█"


def watch(folder: Path, console: Console, *, once: bool = False, every: float = 1.0) -> None:
    """Show the run until it ends, is interrupted, or the caller is. Raises FedtriError where there is no run."""
    run_directory.require(folder)
    if once or not console.is_terminal:
        console.print(view(reading.load(folder), running(folder)))
        return
    with Live(console=console, auto_refresh=False) as live:
        while True:
            run, busy = reading.load(folder), running(folder)
            live.update(view(run, busy), refresh=True)
            if run.finished or not busy:
                return
            time.sleep(every)


def running(folder: Path) -> bool:
    """Whether a process holds the run's lock; asked without writing, so that readers can ask too."""
    try:
        with (folder / ".lock").open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return False
    except FileNotFoundError:
        return False
    except OSError:
        return True


def view(run: Run, busy: bool) -> Group:
    """What is known of a run at this moment."""
    done, planned = len(run.lines), int(reading.number(run.config.get("rounds", 0)) or 0)
    if run.finished:
        state = "finished"
    elif busy:
        per_round = run.total_seconds / done if done else float("nan")
        state = f"running, about {duration(per_round * (planned - done))} left" if done else "running its first round"
    else:
        state = f"stopped; `fedtri resume {run.folder}` goes on"
    heading = f"{run.paper} on {run.config.get('data', '?')}: round {done} of {planned}, {state}"
    parts: list[Text | Table | ProgressBar] = [Text(heading, style="bold")]
    if planned:
        parts.append(ProgressBar(total=planned, completed=done, width=60))
        parts.append(Text())
    if done:
        scores = run.rounds["accuracy"].dropna()
        if len(scores) > 1:
            parts.append(Text(f"mean accuracy {_spark(scores.tolist()[-60:])} {share(scores.iloc[-1])}"))
        parts.append(_table(run))
        parts.append(Text(f"{amount(run.total_bytes)} moved so far, {duration(run.total_seconds)}"))
    parts += [Text(text, style="yellow") for text in run.troubles]
    return Group(*parts)


def _table(run: Run) -> Table:
    headings = ("round", "clients", "loss", "mean", "worst", "best", "local", "up", "down", "seconds")
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for row in run.rounds.tail(ROWS).reset_index().to_dict("records"):
        spent = sum(x for x in (row[f"seconds_{p}"] for p in STAGES) if math.isfinite(x))
        table.add_row(
            str(row["round"]), f"{row['clients']:.0f}",
            *(share(row[c]) for c in ("loss", "accuracy", "accuracy_worst", "accuracy_best", "accuracy_local")),
            amount(row["bytes_up"]), amount(row["bytes_down"]), f"{spent:.1f}",
        )  # fmt: skip
    return table


def _spark(values: list[float]) -> str:
    """Accuracies as a row of blocks, which spans at least NARROWEST_SPAN from top to bottom."""
    low = min(values)
    span = max(max(values) - low, NARROWEST_SPAN)
    return "".join(BLOCKS[round((v - low) / span * (len(BLOCKS) - 1))] for v in values)
