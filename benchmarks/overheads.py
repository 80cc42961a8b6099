"""What a round costs beside its training: evaluation, checkpoint, aggregation; and `fedtri run`'s time to a first step.

    python benchmarks/overheads.py [--quick] [--data PATH/TO/GLUE/SST-2]

The reference work (see simulation.py), each client scored on 40 texts after aggregation. Targets: each below a tenth of
a round's training.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import machine
from contenders import Work, config_of

STARTING = "--starting"


def first_step(work: Work) -> float:
    """Seconds from the start of `fedtri run` to its first training step."""
    arguments = [
        "--data", work.data, "--model", work.model, "--method", "fedit", "--clients", str(work.clients),
        "--set", "partition=iid", "--set", "layers=all", "--set", "rounds=1", "--set", "evaluate=false",
        "--out", str(Path(work.folder) / "first"),
    ]  # fmt: skip
    began = time.time()
    told = subprocess.run([sys.executable, __file__, STARTING, *arguments], check=True, capture_output=True, text=True)
    return float(told.stdout.split()[-1]) - began


def start(arguments: list[str]) -> None:
    """`fedtri run` as far as its first step, and the time then."""
    from fedtri.cli import main
    from fedtri.runs import lifecycle

    whole = lifecycle.run

    def say(*_: object) -> None:
        print(time.time(), flush=True)
        os._exit(0)

    lifecycle.run = lambda config, listener: whole(config, replace(listener, on_step=say))
    sys.argv = ["fedtri", "run", *arguments]
    main.main()


def round_costs(work: Work, rounds: int) -> dict[str, list[float]]:
    """Seconds of each part of each round but the first, which warms up."""
    import torch

    from fedtri.runs import lifecycle
    from fedtri.storage import checkpoint

    torch.set_num_threads(work.threads)
    found: dict[str, list[float]] = {"train": [], "aggregate": [], "evaluate": [], "checkpoint": []}
    save = checkpoint.save

    def timed(*args: object) -> None:
        start = time.perf_counter()
        save(*args)  # type: ignore[arg-type]
        found["checkpoint"].append(time.perf_counter() - start)

    checkpoint.save = timed  # type: ignore[assignment]
    config = config_of(work, out=str(Path(work.folder) / "run"), evaluate=True)
    steps = lifecycle.run(config)
    for _ in range(rounds + 1):
        line = next(steps).line
        for part in ("train", "aggregate", "evaluate"):
            found[part].append(line["seconds"][part])
    steps.close()
    return {part: seconds[1:] for part, seconds in found.items()}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="docstrings")
    parser.add_argument("--model", default="minilm")
    parser.add_argument("--quick", action="store_true", help="4 clients of 3 steps, 2 rounds")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    print(f"{machine.describe()}; {machine.versions('torch', 'transformers')}\n")
    with tempfile.TemporaryDirectory() as folder:
        work = Work(options.data, folder, model=options.model, limit=2000)
        if options.quick:
            work, options.repeats = Work(options.data, folder, model=options.model, clients=4, steps=3, limit=400), 2
        first = first_step(work)
        costs = {part: statistics.median(seconds) for part, seconds in round_costs(work, options.repeats).items()}
    print("| part of a round | s | of its training |\n|---|---|---|")
    for part, seconds in costs.items():
        print(f"| {part} | {seconds:.3f} | {seconds / costs['train']:.1%} |")
    print(f"| start of `fedtri run` to its first step | {first:.2f} | {first / costs['train']:.1%} |")


if __name__ == "__main__":
    if STARTING in sys.argv[1:2]:
        start(sys.argv[2:])
    main()
