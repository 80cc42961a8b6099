"""Where a basis may come from, and how coarse it may be: energy of the pooled first gradient, and accuracy.

    python experiments/bases.py energy OUT.jsonl [--data D] [--public D] [--seed S]
    python experiments/bases.py accuracy OUT.jsonl [--data D] [--public D] [--seeds 0,1,2] [--only NAME,NAME]

Every result is a line of OUT.jsonl. A line that is there already is not computed again, so a stopped script goes on
where it was. "energy" needs one gradient a client and a minute; "accuracy" is a whole run for each line.

The energy of a basis is ‖BᵀG Aᵀ‖² / ‖G‖² for a core and ‖G Aᵀ‖² / ‖G‖² for A alone, with A and B orthonormalised, and
G the mean of the clients' gradients; summed over layers.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fedtri import config
from fedtri.adapters.layout import Key
from fedtri.adapters.subspace import leading
from fedtri.aggregation import means
from fedtri.communication.numbers import NUMBERS
from fedtri.federation import loop
from fedtri.federation.basis import drawn
from fedtri.runs import simulation
from fedtri.seeds import generator
from fedtri.state import ServerState
from fedtri.storage.client_store import ClientStore

HERE = Path(__file__).parent
Dense = Mapping[str, Tensor]
Bases = dict[str, tuple[Tensor, Tensor]]
"""(B, A) of each layer."""


@dataclass(frozen=True)
class Gradients:
    """Every client's gradient of every layer, and the clients' weights."""

    clients: list[Dense]
    weights: list[float]

    def mean(self, layer: str) -> Tensor:
        return sum(w * one[layer] for w, one in zip(self.weights, self.clients, strict=True))  # pyright: ignore


def built(data: str | None, seed: int, folder: str, **values: object) -> simulation.Federation:
    given = dict(values) | ({"data": data} if data else {})
    settings = [f"{key}={json.dumps(value)}" for key, value in given.items()]
    return simulation.build(config.load(HERE / "bases.toml", settings, seed=seed), ClientStore(Path(folder)))


def gradients(found: simulation.Federation, count: int, *, random_labels: bool = False) -> Gradients:
    """Each client's gradient on `count` of its training examples, by the executor of the run."""
    site, names = found.site, list(found.spec.clients)
    rows = [drawn(site.splits[name].train, count, site.seed, name) for name in names]
    executor = site.executor
    if random_labels:
        labels = np.random.default_rng(0).integers(0, len(found.spec.labels), len(executor.examples.labels))
        executor = replace(executor, examples=replace(executor.examples, labels=labels))
    kept: list[dict[str, Tensor]] = [{} for _ in names]

    def keep(place: int) -> Callable[[Dense], dict]:
        def reduce(dense: Dense) -> dict:
            return {Key(name, "W"): value.clone() for name, value in dense.items()}

        return reduce

    models = [site.model(name, site.initial(name)) for name in names]
    for place, one in enumerate(executor.gradients(models, rows, [keep(place) for place in range(len(names))])):
        kept[place] = {key.layer: value.double() for key, value in one.items()}
    sizes = [len(site.splits[name].train) for name in names]
    return Gradients(kept, [n / sum(sizes) for n in sizes])


# number types, as the receiver reads them


def float16(x: Tensor) -> Tensor:
    return x.half().to(x)


def grid(bits: int, *, rows: bool) -> Callable[[Tensor], Tensor]:
    """round(x / s) s with s = max|x| / (2^(bits-1) - 1) of the tensor, or of each row."""

    def rounded(x: Tensor) -> Tensor:
        size = x.abs().amax(1, keepdim=True) if rows else x.abs().amax()
        s = size / (2 ** (bits - 1) - 1)
        return torch.where(s == 0, 0.0, (x / s).round() * s)

    return rounded


def sign(*, rows: bool) -> Callable[[Tensor], Tensor]:
    """sign(x) times the mean of |x| over the tensor, or over each row."""
    return lambda x: x.sign() * (x.abs().mean(1, keepdim=True) if rows else x.abs().mean())


WIRE = ("int4", "int4_mixed", "sign_mixed")
"""Number types of the wire; the mixed ones are what [wire] basis = "int4" and "sign" mean."""
TYPES: dict[str, Callable[[Tensor], Tensor]] = {
    "float32": lambda x: x,
    "float16": float16,
    "int8 a tensor": grid(8, rows=False),
    "int4 a tensor": grid(4, rows=False),
    "int4 a row": grid(4, rows=True),
    "sign a tensor": sign(rows=False),
    "sign a row": sign(rows=True),
    **{name: (lambda x, name=name: NUMBERS[name].rounded(x.float()).double()) for name in WIRE},
}


def pooled(
    found: Gradients, rank: int, sent: int, number: Callable[[Tensor], Tensor], *, rotated: bool = False
) -> Bases:
    """From each client's leading `sent` factors B = U√σ, A = √σVᵀ, rounded in rows of Bᵀ and A; `rotated`: B R and RᵀA
    with an orthogonal R first, so that all rows are of one size."""
    bases: Bases = {}
    for layer in found.clients[0]:
        total: Tensor | float = 0.0
        for place, (weight, one) in enumerate(zip(found.weights, found.clients, strict=True)):
            U, S, V = leading(one[layer], sent, generator(0, str(place), layer))
            Bt, A = (U * S.sqrt()).mT, (V * S.sqrt()).mT
            if rotated:
                R = torch.linalg.qr(torch.randn(sent, sent, generator=generator(1, layer), dtype=torch.float64)).Q
                Bt, A = R @ Bt, R @ A
            total = total + weight * number(Bt).mT @ number(A)
        assert isinstance(total, Tensor)
        U, _, V = leading(total, rank, generator(2, layer))
        bases[layer] = U, V.mT
    return bases


def sketched(found: Gradients, rank: int, columns: int, number: Callable[[Tensor], Tensor]) -> Bases:
    """From sums of G_k Ω and Ψ G_k with public random Ω and Ψ: the range finder of a single pass."""
    bases: Bases = {}
    for layer in found.clients[0]:
        d_out, d_in = found.clients[0][layer].shape
        omega = torch.randn(d_in, columns, generator=generator(3, layer), dtype=torch.float64)
        psi = torch.randn(columns, d_out, generator=generator(4, layer), dtype=torch.float64)
        pairs = list(zip(found.weights, found.clients, strict=True))
        Y = sum(w * number((one[layer] @ omega).mT).mT for w, one in pairs)
        Z = sum(w * number(psi @ one[layer]) for w, one in pairs)
        assert isinstance(Y, Tensor)
        assert isinstance(Z, Tensor)
        U, V = torch.linalg.svd(Y, full_matrices=False).U, torch.linalg.svd(Z, full_matrices=False).Vh.mT
        bases[layer] = U[:, :rank], V[:, :rank].mT
    return bases


def exact(found: Gradients, rank: int) -> Bases:
    bases: Bases = {}
    for layer in found.clients[0]:
        U, _, V = leading(found.mean(layer), rank, generator(2, layer))
        bases[layer] = U, V.mT
    return bases


def drawn_or_from_weights(of: simulation.Federation, basis: str) -> Bases:
    made = built(of.config.data, of.config.seed, of.site.store.folder, basis=basis, method="fed_sb")
    own = made.site.initial(made.spec.clients[0])
    return {la.name: (own[Key(la.name, "B")], own[Key(la.name, "A")]) for la in made.spec.layout.layers}


def rounded(bases: Bases, number: Callable[[Tensor], Tensor]) -> Bases:
    return {layer: (number(B.mT).mT, number(A)) for layer, (B, A) in bases.items()}


def orthonormal(bases: Bases) -> Bases:
    """The orthonormal factors nearest to these, so that no vector is turned more than it must be."""

    def nearest(rows: Tensor) -> Tensor:
        U, _, Vh = torch.linalg.svd(rows.double(), full_matrices=False)
        return U @ Vh

    return {layer: (nearest(B.mT).mT, nearest(A)) for layer, (B, A) in bases.items()}


def energy(found: Gradients, bases: Bases) -> dict[str, float]:
    whole = core = right = 0.0
    for layer, (B, A) in orthonormal(bases).items():
        G = found.mean(layer)
        whole += float(G.square().sum())
        right += float((G @ A.mT).square().sum())
        core += float((B.mT @ G @ A.mT).square().sum())
    return {"core": round(core / whole, 4), "A alone": round(right / whole, 4)}


def energies(of: argparse.Namespace, results: "Results") -> None:
    with tempfile.TemporaryDirectory() as folder:
        federation = built(of.data, of.seed, folder)

        @cache
        def few(count: int = 64) -> Gradients:
            return gradients(federation, count)

        def line(name: str, make: Callable[[], Bases]) -> None:
            results.once(name, of.seed, lambda: energy(few(10**9), make()))

        for count in (8, 16, 32, 64):
            line(f"{count} examples", lambda n=count: exact(few(n), 16))
        line("all examples", lambda: exact(few(10**9), 16))
        for rank in (8, 32):
            line(f"64 examples, rank {rank}", lambda rank=rank: exact(few(), rank))
        for sent in (2, 4, 8, 16, 32):
            line(f"{sent} leading factors", lambda n=sent: pooled(few(), 16, n, float16))
        for columns in (16, 24, 32, 64):
            line(f"range sketch of {columns}", lambda n=columns: sketched(few(), 16, n, float16))
        for name, number in TYPES.items():
            for turned in (False, True):
                line(
                    f"16 leading factors{', rotated' * turned}, {name} up",
                    lambda x=number, turned=turned: pooled(few(), 16, 16, x, rotated=turned),
                )
            for sent in (1, 2, 4):
                line(f"{sent} leading factors, {name} up", lambda x=number, n=sent: pooled(few(), 16, n, x))
            line(f"range sketch of 32, {name} up", lambda x=number: sketched(few(), 16, 32, x))
            line(f"{name} down", lambda x=number: rounded(exact(few(), 16), x))
            line(f"{name} both ways", lambda x=number: rounded(pooled(few(), 16, 16, x, rotated=True), x))
            line(f"4 factors, {name} both ways", lambda x=number: rounded(pooled(few(), 16, 4, x), x))
        for basis in ("orthonormal", "weights"):
            line(basis, lambda b=basis: drawn_or_from_weights(federation, b))
        if of.public:
            line("public texts, random labels", lambda: exact(public_gradients(federation, of.public, folder), 16))


def public_gradients(federation: simulation.Federation, data: str, folder: str) -> Gradients:
    """From 640 texts of another source with random labels, and the federation's own common head."""
    other = built(data, federation.config.seed, folder, **{"data_options.limit": 3600, "partition": "iid"})
    if len(other.spec.labels) != len(federation.spec.labels):  # the head of the federation, on the other texts
        names = federation.spec.clients
        executor = replace(federation.site.executor, examples=other.site.executor.examples)
        splits = dict(zip(names, other.site.splits.values(), strict=True))
        site = replace(federation.site, executor=executor, splits=splits)
        other = replace(federation, site=site)
    return gradients(other, 64, random_labels=True)


def variants(of: argparse.Namespace, seed: int, folder: str) -> dict[str, tuple[dict, Callable[[], Bases] | None]]:
    """Name to (settings, the basis that everyone is given; None: as the settings say)."""
    core, lora = {"method": "gradient_core"}, {"method": "fedit", "targets": "query,value", "rank": 8}
    lora |= {"learning_rate": 3e-3}
    federation = built(of.data, seed, folder)
    kept: list[Gradients] = []

    def own() -> Gradients:
        if not kept:
            kept.append(gradients(federation, 64))
        return kept[0]

    def again(name: str) -> Bases:
        return orthonormal(rounded(pooled(own(), 16, 4, TYPES[name]), TYPES[name]))

    found: dict[str, tuple[dict, Callable[[], Bases] | None]] = {
        "gradient": (core, None),
        "gradient in int4 both ways": ({**core, "wire.basis": "int4"}, None),
        "gradient in sign both ways": ({**core, "wire.basis": "sign"}, None),
        "gradient in int4 both ways, orthonormalised after": (core, lambda: again("int4_mixed")),
        "fedit": (lora, None),
        "fedit, A from the gradient": ({**lora, "basis": "gradient"}, None),
        "orthonormal": ({**core, "basis": "orthonormal"}, None),
        "weights": ({**core, "basis": "weights"}, None),
        "local": ({**lora, "method": "local"}, None),
        "ffa_lora": ({**lora, "method": "ffa_lora"}, None),
        "ffa_lora, A from the gradient": ({**lora, "method": "ffa_lora", "basis": "gradient"}, None),
        "one factor a client": ({**core, "basis_factors": 1}, None),
        "all examples": ({**core, "basis_examples": 1000}, None),
    }
    if of.public:
        found["public texts, random labels"] = (
            core, lambda: exact(public_gradients(federation, of.public, folder), 16),
        )  # fmt: skip
    return found


def accuracies(of: argparse.Namespace, results: "Results") -> None:
    for seed in map(int, of.seeds.split(",")):
        with tempfile.TemporaryDirectory() as folder:
            for name, (settings, basis) in variants(of, seed, folder).items():
                if not of.only or name in of.only.split(","):
                    results.once(name, seed, lambda s=settings, b=basis, seed=seed: accuracy(of, seed, s, b))


def accuracy(of: argparse.Namespace, seed: int, settings: dict, basis: Callable[[], Bases] | None) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        federation = built(of.data, seed, folder, **settings)
        state = ServerState()
        if basis is not None:
            factors = {
                Key(layer, factor): value.float().contiguous()
                for layer, pair in basis().items() for factor, value in zip("BA", pair, strict=True)
            }  # fmt: skip
            state = means.share(state, factors)
        began = time.perf_counter()
        spec = federation.spec
        *_, last = loop.run(spec.method, federation.transport, spec.scales, spec.schedule, state=state)
        scores = last.line["accuracy"]["clients"]
        sizes = {client: len(federation.site.splits[client].test) for client in scores}
        pooled = sum(scores[client] * sizes[client] for client in scores) / sum(sizes.values())
        return {
            "accuracy": round(last.line["accuracy"]["mean"], 4), "over all texts": round(pooled, 4),
            "seconds": round(time.perf_counter() - began, 1),
        }  # fmt: skip


class Results:
    """The lines of a file, one for each name and seed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        lines = path.read_text().splitlines() if path.exists() else []
        self.done = {(line["name"], line["seed"]) for line in map(json.loads, lines)}

    def once(self, name: str, seed: int, make: Callable[[], dict[str, float]]) -> None:
        if (name, seed) in self.done:
            return
        line = {"name": name, "seed": seed, **make()}
        self.done.add((name, seed))
        print(line, flush=True)
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("energy", "accuracy"))
    parser.add_argument("out", type=Path)
    parser.add_argument("--data", help="in place of the embedded docstrings")
    parser.add_argument("--public", help="texts for the basis for which no client sends anything")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--only", help="names of variants, with commas between them")
    given = parser.parse_args()
    given.out.parent.mkdir(parents=True, exist_ok=True)
    {"energy": energies, "accuracy": accuracies}[given.what](given, Results(given.out))


if __name__ == "__main__":
    main()
