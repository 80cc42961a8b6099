"""Many clients in one launch against one client at a time, on a GPU, in float32, mixed precision and bfloat16.

    python benchmarks/gpu.py --data PATH/TO/GLUE/SST-2

The reference work (see simulation.py), in whole rounds of `fedtri run`. Where there is no GPU it says so and measures
nothing; `--device cpu` tries the same code on a processor, whose numbers say nothing of a GPU.
"""

import argparse
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import machine
from contenders import Work, fedtri_rounds

PRECISIONS = {
    "float32": {"dtype": "float32"},
    "mixed": {"dtype": "float32", "mixed_precision": "bfloat16"},
    "bfloat16": {"dtype": "bfloat16"},
}


def seconds_of(work: Work, repeats: int, group: int, budget: int, device: str, precision: str) -> tuple[float, int]:
    """(median seconds of a round, peak bytes that PyTorch took on the GPU), after a round to warm up."""
    import torch

    on_gpu = torch.device(device).type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    rounds = fedtri_rounds(
        work, device=device, model_options=PRECISIONS[precision],
        simulation={"group": group, "token_budget": budget},
    )  # fmt: skip
    found = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        next(rounds)  # it ends with what has learned on the processor, so nothing is left to wait for
        found.append(time.perf_counter() - start)
    rounds.close()
    return statistics.median(found[1:]), torch.cuda.max_memory_allocated() if on_gpu else 0


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="docstrings")
    parser.add_argument("--model", default="minilm")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="4 clients of 3 steps, 2 rounds")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--token-budget", type=int, default=16384, help="tokens a pass where clients share passes")
    options = parser.parse_args()
    import torch

    if options.device.startswith("cuda") and not torch.cuda.is_available():
        print(machine.gpu())
        return
    work = Work(options.data, "", model=options.model)
    if options.quick:
        work, options.repeats = replace(work, clients=4, steps=3, limit=400), 2
    print(f"{machine.describe()}; {machine.gpu()}; {machine.versions('torch', 'transformers')}\n")
    print("| precision | one client at a time, s | all in one launch, s | × | peak GPU memory |\n|---|---|---|---|---|")
    for precision in PRECISIONS:
        found = []
        for group in (1, work.clients):
            with tempfile.TemporaryDirectory() as folder:
                here = replace(work, folder=str(Path(folder)))
                found.append(seconds_of(here, options.repeats, group, options.token_budget, options.device, precision))
        (alone, _), (together, bytes) = found
        print(
            f"| {precision} | {alone:.2f} | {together:.2f} | {alone / together:.2f} | {bytes / 2**20:,.0f} MiB |",
            flush=True,
        )


if __name__ == "__main__":
    main()
