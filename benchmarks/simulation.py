"""The reference work on fedtri, on Flower's simulation with PEFT, and on PEFT in a loop, in turn in one run.

    python benchmarks/simulation.py --data PATH/TO/GLUE/SST-2                # minutes
    python benchmarks/simulation.py --data PATH/TO/GLUE/SST-2 --quick        # fewer steps and rounds

The work: MiniLM, LoRA of rank 8 on query and value of all layers, 10 clients × 10 steps × 16 SST-2 sentences a round.
Each contender is a process of its own and takes its turn while the others are suspended, with all that they started;
the machine's matrix-product rate is measured between turns. A turn is three rounds on end, as a federation's are: the
first is told apart ("after others"), since it may meet what others left of the machine; the other two count.
The mean losses of all rounds must agree, else the script fails: then the work was not the same. "of the limit" counts
real tokens only, each a forward pass and the gradient of every activation through the frozen layers
(2 · 2 · parameters), against that rate, which is float32's; products that a contender finds it can leave out count as
done. Core seconds are those in which a core worked for the contender: on a machine that others use too they tell more
than the clock. "bfloat16" has products alone in it: fedtri's mixed precision, and torch.autocast around PEFT's forward
pass.

`--before CHECKOUT` lets the fedtri of another checkout take part, as a contender of its own: whether a change made a
round slower is then one run's question. Its checkout needs benchmarks/contenders.py, and the same installed packages.

A second competition has adapters on the last layers alone and so few texts that each has been met before: fedtri begins
with the hidden states it has kept. Its ratios are to the work with adapters on all layers.
"""

import argparse
import contextlib
import importlib
import multiprocessing as mp
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from multiprocessing.connection import Connection
from pathlib import Path

import contenders
import machine
from contenders import Work

ATOL = 2e-3
"""How far the mean losses of a round may lie apart after several rounds in float32; after the first, a tenth."""
MIXED_ATOL = 1e-2
"""How far those with bfloat16 products may lie from the others."""
COUNTED = 2
"""How many rounds of a turn count, after the first."""
TURNS = range(1, (contenders.ROUNDS - 2) // (1 + COUNTED) + 1)
PACKAGES = ("torch", "transformers", "peft", "flwr", "ray", "numpy")


FEDTRI, FLOWER, PEFT = "fedtri", "Flower + PEFT", "PEFT in a loop"
BEFORE = "fedtri before"


@dataclass
class Contender:
    """A process that trains a round when told to, and what it said."""

    name: str
    kind: str
    work: Work
    seconds: list[float] = field(default_factory=list)
    """Of the rounds that count."""
    worked: list[float] = field(default_factory=list)
    """Seconds that cores worked for it in each of them."""
    after: list[float] = field(default_factory=list)
    """Seconds of the first round of each turn."""
    losses: list[float] = field(default_factory=list)
    """Of all rounds."""
    first: float = 0.0
    """Seconds from its start to the end of its first round."""
    bytes: int = 0
    checkout: Path | None = None
    """Another checkout's fedtri; None: the one that is installed."""

    def start(self) -> None:
        """Start the process; it waits for its first turn."""
        self.pipe, theirs = mp.Pipe()
        self.process = mp.get_context("spawn").Process(target=serve, args=(self.kind, self.work, theirs, self.checkout))
        self.process.start()

    def turn(self) -> None:
        """Three rounds on end, of which the last two count."""
        assert self.process.pid is not None
        machine.resume(self.process.pid)
        self.after.append(self.round())
        for _ in range(COUNTED):
            before = machine.cpu_seconds(self.process.pid)
            self.seconds.append(self.round())
            self.worked.append(machine.cpu_seconds(self.process.pid) - before)
        machine.suspend(self.process.pid)

    def round(self) -> float:
        """Seconds of one round."""
        self.pipe.send(True)
        while not self.pipe.poll(1):
            if not self.process.is_alive():
                raise SystemExit(f"{self.name}: ended in mid-round; what it said stands above")
        seconds, loss = self.pipe.recv()
        self.losses.append(loss)
        return seconds

    def stop(self) -> None:
        """Let the process end."""
        if self.process.pid is not None:
            machine.resume(self.process.pid)
        with contextlib.suppress(OSError):
            self.pipe.send(False)
        self.process.join(60)
        self.process.kill()


def serve(kind: str, work: Work, pipe: Connection, checkout: Path | None = None) -> None:
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

    if kind == FLOWER:
        contenders.flower_rounds(work, say, wait)
        return
    module = contenders
    if checkout is not None:
        sys.path[:0] = [str(checkout / "src"), str(checkout / "benchmarks")]
        del sys.modules["contenders"]
        module = importlib.import_module("contenders")
        Path(work.folder, "before").mkdir(exist_ok=True)
        work = replace(work, folder=str(Path(work.folder, "before")))
    rounds: Iterator[float] = (module.peft_rounds if kind == PEFT else module.fedtri_rounds)(work)
    while wait():
        say(next(rounds))


def in_bfloat16(one: Contender) -> Contender:
    """The same work with products in bfloat16."""
    return Contender(f"{one.name}, bfloat16", one.kind, replace(one.work, mixed=True), checkout=one.checkout)


def before(checkout: Path | None, name: str, work: Work) -> list[Contender]:
    """The contender from another checkout, where there is one."""
    return [] if checkout is None else [Contender(name, BEFORE, work, checkout=checkout.absolute())]


@dataclass(frozen=True)
class Found:
    """What a competition found: the machine's FLOP/s by the clock and by the seconds its cores worked for us."""

    crew: list[Contender]
    rate: float
    working: float
    tokens: Sequence[int]
    threads: int


def compete(crew: list[Contender], turns: int, tokens: Sequence[int], hidden: int, inner: int) -> Found:
    """Two rounds of each with memory watched, then all contenders in turn, so many times."""
    rates = []
    try:
        for one in crew:
            one.start()
            assert one.process.pid is not None
            with machine.peak_memory(one.process.pid) as peak:
                one.first = one.round()
                one.round()
                one.bytes = peak()
            machine.suspend(one.process.pid)
            print(f"{one.name}: first round {one.first:.1f} s", file=sys.stderr, flush=True)
        for turn in range(turns):
            rates.append(machine.matrix_rate(hidden, inner, threads=crew[0].work.threads))
            for one in crew if turn % 2 == 0 else crew[::-1]:
                one.turn()
            print(", ".join(f"{one.name} {one.seconds[-1]:.2f} s" for one in crew), file=sys.stderr, flush=True)
    finally:
        for one in crew:
            one.stop()
    same_work(crew)
    rate, working = (statistics.median(values) for values in zip(*rates, strict=True))
    counted = [count for at, count in enumerate(tokens[2:]) if at % (1 + COUNTED)][: turns * COUNTED]
    return Found(crew, rate, working, counted, crew[0].work.threads)


def same_work(crew: Sequence[Contender]) -> None:
    """Exit with an error where losses on the same work differ by more than rounding explains."""
    for work in {replace(one.work, mixed=False) for one in crew}:
        same = [one for one in crew if replace(one.work, mixed=False) == work]
        for round, losses in enumerate(zip(*(one.losses for one in same), strict=True)):
            exact = [loss for one, loss in zip(same, losses, strict=True) if not one.work.mixed]
            apart, rounded = max(exact) - min(exact), max(losses) - min(losses)
            if apart > (ATOL if round else ATOL / 10) or rounded > MIXED_ATOL:
                said = ", ".join(f"{one.name} {loss:.5f}" for one, loss in zip(same, losses, strict=True))
                raise SystemExit(
                    f"round {round + 1}: the losses differ by {rounded:.1e}: {said}; the work was not the same"
                )


def rows(found: Found, flop: float) -> list[str]:
    """The table's lines in Markdown; ratios are medians of paired rounds."""
    crew, tokens = found.crew, statistics.mean(found.tokens)
    plain = [one for one in crew if not one.work.mixed]
    base = next((one for one in plain if one.kind in (FLOWER, BEFORE)), plain[-1])
    lines = [
        f"| | s a round | (fastest, slowest) | real tokens/s | × {base.name} | of the limit | after others | × "
        "| core seconds | × | of the limit | peak memory |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for one in crew:
        seconds, worked = statistics.median(one.seconds), statistics.median(one.worked)
        faster = statistics.median(b / s for b, s in zip(base.seconds, one.seconds, strict=True))
        first = statistics.median(b / s for b, s in zip(base.after, one.after, strict=True))
        lighter = statistics.median(b / s for b, s in zip(base.worked, one.worked, strict=True))
        speed = tokens / seconds
        lines.append(
            f"| {one.name} | {seconds:.2f} | ({min(one.seconds):.2f}, {max(one.seconds):.2f}) "
            f"| {speed:,.0f} | {faster:.2f} | {speed * flop / found.rate:.0%} "
            f"| {statistics.median(one.after):.2f} | {first:.2f} "
            f"| {worked:.2f} | {lighter:.2f} "
            f"| {tokens * flop / worked / found.working * found.threads:.0%} | {one.bytes / 2**20:,.0f} MiB |"
        )
    return lines


def flop_a_token(work: Work) -> tuple[float, int, int]:
    """(FLOP a real token, hidden, inner width) of forward and backward through the frozen layers."""
    from transformers import AutoConfig

    from fedtri.models.loading import locate

    shape = AutoConfig.from_pretrained(locate(work.model))
    parameters = shape.num_hidden_layers * (4 * shape.hidden_size**2 + 2 * shape.hidden_size * shape.intermediate_size)
    return 4.0 * parameters, shape.hidden_size, shape.intermediate_size


def setup(works: Sequence[Work], pipe: Connection) -> None:
    """What needs fedtri before the contenders start, in a process of its own so that this one stays small."""
    tokens = [contenders.prepare(work) for work in works]
    pipe.send((tokens[0], *flop_a_token(works[0])))


def competition(title: str, crew: list[Contender], turns: int) -> list[str]:
    """One competition's text: what was done, and its table."""
    works = list(dict.fromkeys(replace(one.work, mixed=False) for one in crew))
    ours, theirs = mp.Pipe()
    process = mp.get_context("spawn").Process(target=setup, args=(works, theirs))
    process.start()
    tokens, flop, hidden, inner = ours.recv()
    process.join()
    found, work = compete(crew, turns, tokens, hidden, inner), works[0]
    return [
        f"## {title}\n",
        f"{work.clients} clients × {work.steps} steps × {work.batch_size}, {statistics.mean(found.tokens):,.0f} real "
        f"tokens a round, {flop / 1e6:.1f} MFLOP each through all layers; medians of {turns * COUNTED} rounds; matrix "
        f"products {found.rate / 1e9:.0f} GFLOP/s on {work.threads} threads by the clock, "
        f"{found.working / 1e9:.0f} by core seconds\n",
        *rows(found, flop),
        "",
    ]


def main() -> None:
    """Print the tables, and write them where --out says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="SST-2's folder in GLUE's layout, or any data fedtri reads")
    parser.add_argument("--model", default="minilm", help="a BERT-like encoder; the reference is minilm")
    parser.add_argument("--quick", action="store_true", help="4 clients of 3 steps, one turn; Flower in the first")
    parser.add_argument("--turns", type=int, default=3, choices=TURNS, help="of each, two rounds that count in each")
    parser.add_argument("--without", action="append", default=[], choices=[FLOWER, PEFT], help="leave a contender out")
    parser.add_argument("--last", type=int, default=2, help="adapters on so many last layers in the second competition")
    parser.add_argument("--only", choices=["all", "last"], help="one of the two competitions")
    parser.add_argument("--before", type=Path, help="another checkout, whose fedtri takes part too")
    parser.add_argument("--out", type=Path, help="also write the result to this file")
    options = parser.parse_args()
    if FLOWER not in options.without and find_spec("ray") is None:
        print("Flower's simulation is not installed (pip install 'flwr[simulation]'): left out", file=sys.stderr)
        options.without.append(FLOWER)
    lines = [
        "# Speed of a round\n",
        f"`python {' '.join(sys.argv)}`\n",
        f"{machine.describe()}; {machine.versions(*PACKAGES)}\n",
        f"{machine.gpu()}\n",
    ]
    with tempfile.TemporaryDirectory() as folder:
        work = Work(options.data, str(Path(folder) / "all"), model=options.model)
        if options.quick:
            work, options.turns = replace(work, clients=4, steps=3, limit=1000), min(options.turns, 1)
        few = replace(work, folder=str(Path(folder) / "few"), limit=24 * work.steps * work.clients)
        last = replace(few, folder=str(Path(folder) / "last"), layers=f"last:{options.last}")
        for one in (work, few, last):
            Path(one.folder).mkdir()
        kinds = [kind for kind in (FEDTRI, FLOWER, PEFT) if kind not in options.without]
        above = f"last {options.last} layers"
        if options.only != "last":
            crew = [Contender(kind, kind, work) for kind in kinds] + before(options.before, BEFORE, work)
            crew += [
                in_bfloat16(one) for one in crew
                if one.kind in (FEDTRI, BEFORE) or (one.kind == FLOWER and not options.quick)
            ]  # fmt: skip
            lines += competition("Adapters on all layers", crew, options.turns)
        if options.only != "all":
            if options.quick:
                kinds = [kind for kind in kinds if kind != FLOWER]
            crew = [Contender(f"{kind}, all layers", kind, few) for kind in kinds if kind == FLOWER]
            crew += [Contender(f"{kind}, {above}", kind, last) for kind in kinds]
            crew += before(options.before, f"{BEFORE}, {above}", last)
            crew += [in_bfloat16(one) for one in crew if one.kind in (FEDTRI, BEFORE)]
            lines += competition(f"Adapters on the {above}, all texts met before", crew, options.turns)
    print("\n".join(lines))
    if options.out:
        options.out.write_text("\n".join(lines).rstrip() + "\n")


if __name__ == "__main__":
    main()
