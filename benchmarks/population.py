"""What 1,000 simulated clients cost where a tenth takes part in a round: start-up, and memory as the population grows.

    python benchmarks/population.py [--quick] [--data PATH]

The same number of clients trains in every row, so what grows with the population shows. Each row is a process of its
own. Start-up is from the process's start, imports included, to the first training step. Targets on two cores: 1,000
clients start within 15 s, and memory grows with the clients sampled, not with the population.
"""

import argparse
import multiprocessing as mp
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path

import machine
from contenders import Work, config_of


def serve(work: Work, sampled: int, rounds: int, began: float, pipe: Connection) -> None:
    """Train so many rounds; says when the first step was taken, and the seconds of the last round."""
    from fedtri.runs import lifecycle

    first: list[float] = []
    listener = lifecycle.Listener(on_step=lambda slot, step, loss: first or first.append(time.time() - began))
    config = config_of(work, out=str(Path(work.folder) / "run"), fraction=sampled / work.clients)
    steps = lifecycle.run(config, listener)
    for _ in range(rounds):
        start = time.perf_counter()
        next(steps)
        seconds = time.perf_counter() - start
    pipe.send((first[0], seconds))
    pipe.recv()


def measure(work: Work, sampled: int, rounds: int) -> tuple[float, float, int]:
    """(seconds to the first step, seconds of the last round, peak bytes) of such a population."""
    ours, theirs = mp.Pipe()
    process = mp.get_context("spawn").Process(target=serve, args=(work, sampled, rounds, time.time(), theirs))
    process.start()
    assert process.pid is not None
    with machine.peak_memory(process.pid, every=0.5) as peak:
        while not ours.poll(1):
            if not process.is_alive():
                raise SystemExit("a federation ended early; what it said stands above")
        first, seconds = ours.recv()
    ours.send(True)
    process.join(60)
    return first, seconds, peak()


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="docstrings", help="any data fedtri reads, of 10 examples a client and more")
    parser.add_argument("--model", default="minilm")
    parser.add_argument("--quick", action="store_true", help="10 of 100 clients")
    parser.add_argument("--clients", type=int, nargs="+", help="the populations")
    parser.add_argument("--sampled", type=int, help="how many train in a round")
    options = parser.parse_args()
    populations = options.clients or ([10, 100] if options.quick else [100, 300, 1000])
    sampled, rounds = options.sampled or (10 if options.quick else 100), 2
    print(
        f"{machine.describe()}; {machine.versions('torch', 'transformers')}; {sampled} clients a round, 2 steps of 4\n"
    )
    print("| clients | s to the first step | s a round | peak memory |\n|---|---|---|---|")
    for clients in populations:
        with tempfile.TemporaryDirectory() as folder:
            work = Work(options.data, folder, model=options.model, clients=clients, steps=2, batch_size=4)
            first, seconds, bytes = measure(work, min(sampled, clients), rounds)
        print(f"| {clients:,} | {first:.1f} | {seconds:.1f} | {bytes / 2**20:,.0f} MiB |", flush=True)


if __name__ == "__main__":
    main()
