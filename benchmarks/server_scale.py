"""How a ce_lora server step (core similarity, weights, mixing) and the data similarity grow with the clients.

python benchmarks/server_scale.py [--quick]: 24 layers, rank 8. Each size runs in a process of its own, so
that its peak memory is its own. Targets on 2 cores: 10,000 clients under 8 s and 2 GiB; 1,000 clients' data
similarity under 90 s.
"""

import argparse
import json
import math
import resource
import statistics
import subprocess
import sys
import time

import numpy as np
import torch

from fedtri.messages import Mixture, Sketch
from fedtri.similarity.cores import core_similarity
from fedtri.similarity.distances import client_distance, data_distances, data_similarity, extend_distances
from fedtri.similarity.mixing import row_stochastic

LAYERS, RANK = 24, 8
WIDTH, CLASSES, COMPONENTS = 384, 6, 3


def server_step(clients: int) -> dict[str, float]:
    """One server step over cores near the identity; the data similarity is there already, as in a run."""
    generator = torch.Generator().manual_seed(0)
    cores = torch.eye(RANK) + 0.01 * torch.randn(clients, LAYERS, RANK, RANK, generator=generator)
    data = torch.rand(clients, clients, generator=generator).fill_diagonal_(1)
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        model = core_similarity(cores, reference="init")
        weights = data + model
        row_stochastic(weights, out=weights)
        mixed = weights @ cores.flatten(1)  # (m, layers r r)
        seconds.append(time.perf_counter() - start)
        del model, weights, mixed
    return {"seconds": statistics.median(seconds), "gib": peak_gib()}


def data_step(clients: int) -> dict[str, float]:
    """Data similarity of plausible sketches, one newcomer, largest deviation from POT on 200 pairs."""
    sketches = random_sketches(clients + 1, seed=0)
    start = time.perf_counter()
    distances = data_distances(sketches[:-1])
    data_similarity(distances)
    seconds = time.perf_counter() - start
    start = time.perf_counter()
    extend_distances(distances, sketches)
    newcomer = time.perf_counter() - start
    rng = np.random.default_rng(1)
    pairs = [rng.choice(clients, 2, replace=False) for _ in range(200)]
    exact = np.array([client_distance(sketches[i], sketches[j]) for i, j in pairs])
    deviation = np.abs(np.array([distances[i, j] for i, j in pairs]) / exact - 1).max()
    return {"seconds": seconds, "newcomer": newcomer, "deviation": float(deviation), "gib": peak_gib()}


def random_sketches(clients: int, seed: int) -> list[Sketch]:
    """Features of norm about 1: classes share centres, clients shift them, class counts are Dirichlet(0.5)."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(0, 1 / math.sqrt(WIDTH), (CLASSES, COMPONENTS, WIDTH))

    def mixture(label: int) -> Mixture:
        means = centres[label] + rng.normal(0, 0.5 / math.sqrt(WIDTH), (COMPONENTS, WIDTH))
        variances = rng.gamma(4, 0.25 / WIDTH, (COMPONENTS, WIDTH)) + 1e-6
        weights = rng.dirichlet(np.full(COMPONENTS, 5.0))
        return Mixture(*(a.astype(np.float32) for a in (weights, means, variances)))

    def sketch() -> Sketch:
        counts = (1000 * rng.dirichlet(np.full(CLASSES, 0.5))).astype(np.int32) + 5
        return Sketch(counts, {label: mixture(label) for label in range(CLASSES)})

    return [sketch() for _ in range(clients)]


def peak_gib() -> float:
    """Peak resident memory of this process so far, in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def alone(step: str, clients: int) -> dict[str, float]:
    """The step in a process of its own."""
    command = [sys.executable, __file__, "--step", step, "--clients", str(clients)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes, in seconds")
    parser.add_argument("--step", choices=["server", "data"], help=argparse.SUPPRESS)
    parser.add_argument("--clients", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.step:
        print(json.dumps({"server": server_step, "data": data_step}[args.step](args.clients)))
        return
    print(f"ce_lora server step, {LAYERS} layers, rank {RANK}, {torch.get_num_threads()} threads")
    print(f"{'clients':>8} {'seconds':>9} {'peak GiB':>9} {'growth':>9}")
    before = 0.0
    for clients in (10, 100, 1000) if args.quick else (10, 100, 1000, 10000):
        found = alone("server", clients)
        growth = f"{found['seconds'] / before:8.1f}x" if before else ""
        print(f"{clients:8d} {found['seconds']:9.4f} {found['gib']:9.2f} {growth:>9}", flush=True)
        before = found["seconds"]
    clients = 40 if args.quick else 1000
    found = alone("data", clients)
    print(
        f"data similarity, {clients} clients, {CLASSES} classes of {COMPONENTS} components, d = {WIDTH}: "
        f"{found['seconds']:.1f} s, {found['gib']:.2f} GiB; one newcomer {found['newcomer']:.2f} s; "
        f"max deviation from POT on 200 pairs {found['deviation']:.1e}"
    )


if __name__ == "__main__":
    main()
