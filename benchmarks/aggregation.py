"""FLoRA-NA's Table 1 done honestly: time and ρ of four ways to average the products B_kA_k of m clients.

    python benchmarks/aggregation.py            # the whole table; the dense SVD up to d = 768
    python benchmarks/aggregation.py --quick    # one row, seconds
    python benchmarks/aggregation.py --dense-up-to 4096

One d × d layer. The factors are drawn, not trained. Every client starts from one Kaiming-uniform A and B
= 0; client k moves a distance t_k, uniform in [0.5, 1.5], along a common and an own random direction of
equal size: B_k = t_k (common + own) / √2 and A_k = A + 0.1 t_k (common + own) / √2, in units of A's
standard deviation. Weights are uniform. ρ = ‖mean product − what is sent down‖_F / ‖mean product‖_F.
Calls of all variants take turns; above d = 768 the dense SVD is timed once.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable

import machine
import torch
from torch import Tensor

from fedtri.aggregation import products
from fedtri.methods.flora_na import nearest_average

Variant = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def draw(m: int, d: int, r: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """B (1, m, d, r), A (1, m, r, d) and weights (m,), as the module's docstring says; float32."""

    def moves(*shape: int) -> Tensor:
        common, own = (
            torch.randn(1, 1, *shape, generator=generator),
            torch.randn(1, m, *shape, generator=generator),
        )
        return (common + own) / 2**0.5

    distance = 0.5 + torch.rand(1, m, 1, 1, generator=generator)
    start = (2 * torch.rand(1, 1, r, d, generator=generator) - 1) * 3**0.5
    return (
        (distance * moves(d, r)) / d**0.5,
        (start + 0.1 * distance * moves(r, d)) / d**0.5,
        torch.full((m,), 1 / m),
    )


def fedit(B: Tensor, A: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """The means of the factors."""
    return torch.einsum("k,lkor->lor", weights, B), torch.einsum("k,lkri->lri", weights, A)


def flora_na(B: Tensor, A: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """FLoRA-NA's alternating solves."""
    return nearest_average(B, A, weights)[:2]


def best_rank(B: Tensor, A: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Best rank r by QR of the stacks."""
    return products.best_low_rank(B, A, weights, B.shape[-1])


def dense_svd(B: Tensor, A: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Best rank r by the SVD of the d × d mean product, which is what the others avoid."""
    left, right = products.stacked(B, A, weights)
    U, S, Vh = torch.linalg.svd(left @ right, full_matrices=False)
    r = B.shape[-1]
    return U[..., :r] * S[:, None, :r], Vh[:, :r]


VARIANTS: dict[str, Variant] = {
    "fedit": fedit,
    "flora_na": flora_na,
    "best rank r, QR": best_rank,
    "dense SVD": dense_svd,
}


def measure(clients: tuple[Tensor, Tensor, Tensor], variants: dict[str, Variant], repeats: int) -> dict[str, str]:
    """Time and ρ of each variant: a call each to warm up, then all in turn, `repeats` times."""
    rho = {name: products.residual(*clients, *variant(*clients)).item() for name, variant in variants.items()}
    times: dict[str, list[float]] = {name: [] for name in variants}
    for repeat in range(repeats):
        for name, variant in variants.items():
            if repeat > 0 and name == "dense SVD" and clients[0].shape[2] > 768:
                continue
            start = time.perf_counter()
            variant(*clients)
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: f"{statistics.median(t):.1f} ({min(t):.1f}) ms, {rho[name]:.5f}" for name, t in times.items()}


def main() -> None:
    """Print the table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="m = 10, d = 768, r = 8 only")
    parser.add_argument("--dense-up-to", type=int, default=768, help="largest d given to the dense SVD")
    parser.add_argument("--repeats", type=int, default=7, help="timed calls of each variant")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    sizes = [(m, d, r) for d in (768, 4096) for m in (10, 50, 100) for r in (8, 16)]
    print(f"`python {' '.join(sys.argv)}`\n")
    about = f"{machine.cpu()}, {torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}"
    print(f"{about}, torch {torch.__version__}; float32 factors")
    print(f"{options.repeats} calls: median (fastest), ρ\n")
    print("| d | m | r | " + " | ".join(VARIANTS) + " |")
    print("|---|---|---|" + "---|" * len(VARIANTS))
    for m, d, r in sizes[:1] if options.quick else sizes:
        clients = draw(m, d, r, torch.Generator().manual_seed(options.seed))
        runnable = {name: f for name, f in VARIANTS.items() if name != "dense SVD" or d <= options.dense_up_to}
        cells = measure(clients, runnable, options.repeats)
        print(
            f"| {d} | {m} | {r} | " + " | ".join(cells.get(name, "not run") for name in VARIANTS) + " |",
            flush=True,
        )


if __name__ == "__main__":
    main()
