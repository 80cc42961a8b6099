"""The reference work on fedtri, on Flower's simulation with PEFT, and on PEFT in a loop, in turn in one run.

    python benchmarks/simulation.py --data PATH/TO/GLUE/SST-2                # minutes
    python benchmarks/simulation.py --data PATH/TO/GLUE/SST-2 --quick        # fewer steps and rounds

The work: MiniLM, LoRA of rank 8 on query and value of all layers, 10 clients × 10 steps × 16 SST-2 sentences a round.
Each contender is a process of its own and takes its turn, round by round, while the others wait; the machine's
matrix-product rate is measured between them. The mean losses of all rounds must agree, else the script fails: then the
work was not the same. "of the limit" counts real tokens only, each a forward pass and the gradient of every activation
through the frozen layers (2 · 2 · parameters), against that rate. Core seconds are those in which a core worked for the
contender: on a machine that others use too they tell more than the clock.
"""

import argparse
import contextlib
import multiprocessing as mp
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from pathlib import Path

import contenders
import machine
from contenders import Work

ATOL = 2e-3
"""How far the mean losses of a round may lie apart after several rounds in float32; after the first, a tenth."""
PACKAGES = ("torch", "transformers", "peft", "flwr", "ray", "numpy")


@dataclass
class Contender:
    """A process that trains a round when told to, and what it said."""

    name: str
    work: Work
    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    worked: list[float] = field(default_factory=list)
    """Seconds that cores worked for it in each round, the first ones too."""
    first: float = 0.0
    """Seconds from its start to the end of its first round."""
    bytes: int = 0

    def start(self) -> None:
        """Start the process; it waits for its first turn."""
        self.pipe, theirs = mp.Pipe()
        self.process = mp.get_context("spawn").Process(target=serve, args=(self.name, self.work, theirs))
        self.process.start()

    def turn(self) -> float:
        """Seconds of one round."""
        assert self.process.pid is not None
        before = machine.cpu_seconds(self.process.pid)
        self.pipe.send(True)
        while not self.pipe.poll(1):
            if not self.process.is_alive():
                raise SystemExit(f"{self.name}: ended in mid-round; what it said stands above")
        seconds, loss = self.pipe.recv()
        self.losses.append(loss)
        self.worked.append(machine.cpu_seconds(self.process.pid) - before)
        return seconds

    def stop(self) -> None:
        """Let the process end."""
        with contextlib.suppress(OSError):
            self.pipe.send(False)
        self.process.join(60)
        self.process.kill()


def serve(name: str, work: Work, pipe: Connection) -> None:
    """A contender's own process: a round whenever it is told to."""
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")  # as fedtri's command line does; kind to all three
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))  # for Ray's actors
    began = 0.0

    def wait() -> bool:
        nonlocal began
        go_on = pipe.recv()
        began = time.perf_counter()
        return go_on

    def say(loss: float) -> None:
        pipe.send((time.perf_counter() - began, loss))

    if name == FLOWER:
        contenders.flower_rounds(work, say, wait)
        return
    rounds: Iterator[float] = (contenders.peft_rounds if name == PEFT else contenders.fedtri_rounds)(work)
    while wait():
        say(next(rounds))


FEDTRI, FLOWER, PEFT = "fedtri", "Flower + PEFT", "PEFT in a loop"


@dataclass(frozen=True)
class Found:
    """What a competition found: the machine's FLOP/s by the clock and by the seconds its cores worked for us."""

    crew: list[Contender]
    rate: float
    working: float
    tokens: Sequence[int]
    threads: int


def compete(works: dict[str, Work], repeats: int, tokens: Sequence[int], hidden: int, inner: int) -> Found:
    """All contenders in turn: a first round apiece with memory watched, one to warm up, then `repeats` that count."""
    crew = [Contender(name, work) for name, work in works.items()]
    rates = []
    try:
        for one in crew:
            one.start()
            assert one.process.pid is not None
            with machine.peak_memory(one.process.pid) as peak:
                one.first = one.turn()
                one.turn()
                one.bytes = peak()
            print(f"{one.name}: first round {one.first:.1f} s", file=sys.stderr, flush=True)
        for repeat in range(repeats):
            rates.append(machine.matrix_rate(hidden, inner, threads=works[crew[0].name].threads))
            for one in crew if repeat % 2 == 0 else crew[::-1]:
                one.seconds.append(one.turn())
            print(", ".join(f"{one.name} {one.seconds[-1]:.2f} s" for one in crew), file=sys.stderr, flush=True)
    finally:
        for one in crew:
            one.stop()
    same_work(crew)
    rate, working = (statistics.median(values) for values in zip(*rates, strict=True))
    return Found(crew, rate, working, tokens[2 : 2 + repeats], works[crew[0].name].threads)


def same_work(crew: Sequence[Contender]) -> None:
    """Exit with an error where the contenders' losses differ by more than rounding explains."""
    for round, losses in enumerate(zip(*(one.losses for one in crew), strict=True)):
        apart = max(losses) - min(losses)
        if apart > (ATOL if round else ATOL / 10):
            said = ", ".join(f"{one.name} {loss:.5f}" for one, loss in zip(crew, losses, strict=True))
            raise SystemExit(f"round {round + 1}: the losses differ by {apart:.1e}: {said}; the work was not the same")


def rows(found: Found, flop: float) -> list[str]:
    """The table's lines in Markdown; ratios are medians of paired rounds."""
    crew, tokens = found.crew, statistics.mean(found.tokens)
    base = next((one for one in crew if one.name == FLOWER), crew[-1])
    lines = [
        f"| | s a round | (fastest, slowest) | real tokens/s | × {base.name} | of the limit | core seconds | × | "
        "of the limit | peak memory |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for one in crew:
        seconds, worked = statistics.median(one.seconds), statistics.median(one.worked[2:])
        faster = statistics.median(b / s for b, s in zip(base.seconds, one.seconds, strict=True))
        lighter = statistics.median(b / s for b, s in zip(base.worked[2:], one.worked[2:], strict=True))
        lines.append(
            f"| {one.name} | {seconds:.2f} | ({min(one.seconds):.2f}, {max(one.seconds):.2f}) "
            f"| {tokens / seconds:,.0f} | {faster:.2f} | {tokens * flop / seconds / found.rate:.0%} "
            f"| {worked:.2f} | {lighter:.2f} "
            f"| {tokens * flop / worked / found.working * found.threads:.0%} | {one.bytes / 2**20:,.0f} MiB |"
        )
    return lines


def flop_a_token(work: Work) -> tuple[float, int, int]:
    """(FLOP a real token, hidden, inner width) of forward and backward through the frozen layers."""
    from transformers import AutoConfig

    from fedtri.models import locate

    shape = AutoConfig.from_pretrained(locate(work.model))
    parameters = shape.num_hidden_layers * (4 * shape.hidden_size**2 + 2 * shape.hidden_size * shape.intermediate_size)
    return 4.0 * parameters, shape.hidden_size, shape.intermediate_size


def setup(work: Work, pipe: Connection) -> None:
    """What needs fedtri before the contenders start, in a process of its own so that this one stays small."""
    pipe.send((contenders.prepare(work), *flop_a_token(work)))


def main() -> None:
    """Print the tables, and write them where --out says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="SST-2's folder in GLUE's layout, or any data fedtri reads")
    parser.add_argument("--model", default="minilm", help="a BERT-like encoder; the reference is minilm")
    parser.add_argument("--quick", action="store_true", help="4 clients of 3 steps, 3 rounds")
    parser.add_argument("--repeats", type=int, default=7, help="timed rounds of each")
    parser.add_argument("--without", action="append", default=[], choices=[FLOWER, PEFT], help="leave a contender out")
    parser.add_argument("--out", type=Path, help="also write the result to this file")
    options = parser.parse_args()
    about = machine.describe()
    with tempfile.TemporaryDirectory() as folder:
        work = Work(options.data, folder, model=options.model)
        if options.quick:
            work, options.repeats = replace(work, clients=4, steps=3), min(options.repeats, 3)
        ours, theirs = mp.Pipe()
        process = mp.get_context("spawn").Process(target=setup, args=(work, theirs))
        process.start()
        tokens, flop, hidden, inner = ours.recv()
        process.join()
        works = {name: work for name in (FEDTRI, FLOWER, PEFT) if name not in options.without}
        found = compete(works, options.repeats, tokens, hidden, inner)
    lines = [
        f"`python {' '.join(sys.argv)}`\n",
        f"{about}; {machine.versions(*PACKAGES)}\n",
        f"{work.clients} clients × {work.steps} steps × {work.batch_size}, {statistics.mean(found.tokens):,.0f} real "
        f"tokens a round, {flop / 1e6:.1f} MFLOP each; medians of {options.repeats} rounds; matrix products "
        f"{found.rate / 1e9:.0f} GFLOP/s on {work.threads} threads by the clock, {found.working / 1e9:.0f} by core "
        "seconds\n",
        *rows(found, flop),
    ]
    print("\n".join(lines))
    if options.out:
        options.out.write_text("# Speed\n\n" + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
