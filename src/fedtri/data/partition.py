"""Deals the pool to clients once, and splits each client's part. So a client's test set has its train set's label mix.

iid               equal parts of a random order
dirichlet:ALPHA   for each class, the clients' shares are drawn from Dirichlet(ALPHA, ..., ALPHA); clients differ in
                  size. This is the Dirichlet partition of flwr-datasets (arXiv:2102.02079), which draws over clients
                  for each class. FedPETuning draws around the label prior for each client, with equal sizes. The same
                  ALPHA means a different skew there.
pathological:K    K classes for each client: the first in turn, the others at random. A class that no client drew is
                  left out (arXiv:2102.02079).
natural:COLUMN    one client for each value of a column
"""

import math
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import quote

import datasets
import numpy as np
from jaxtyping import Int

from fedtri.data.pool import Pool
from fedtri.errors import FedtriError
from fedtri.seeds import derive

N = TypeVar("N", int, float)
SPECS = '"iid", "dirichlet:0.3", "pathological:2" or "natural:COLUMN"'
ENOUGH, LEAST = (
    10,
    2,
)  # examples of a client: two in test at the usual fractions; at least one in train and one in test


@dataclass(frozen=True)
class Split:
    """The row indices of one client's examples in the pool."""

    train: Int[np.ndarray, "n_train"]
    validation: Int[np.ndarray, "n_validation"]
    test: Int[np.ndarray, "n_test"]


def partition(
    pool: Pool,
    *,
    spec: str,
    clients: int | None,
    seed: int,
    fractions: tuple[float, float, float] = (0.7, 0.1, 0.2),
) -> dict[str, Split]:
    """Disjoint splits of the pool, by client id in sorted order. The same pool and seed give the same splits.

    Args:
        pool: All examples.
        spec: One of the four kinds above.
        clients: The number of clients; may be None for "natural:COLUMN", where the column decides.
        seed: The run's seed.
        fractions: Train, validation, test. A client with four or more examples has at least two in test.

    Raises:
        FedtriError: If the spec is unknown, the pool cannot satisfy it, or a client has no train or test example.
    """
    if not (min(fractions) >= 0 and fractions[0] > 0 and fractions[2] > 0 and math.isclose(sum(fractions), 1)):
        raise FedtriError(f"fractions: expected train > 0, validation >= 0 and test > 0 summing to 1, got {fractions}")
    parts = deal(pool, spec, clients, seed)
    return {client: split(spec, client, parts[client], seed, fractions) for client in sorted(parts)}


def split(spec: str, client: str, rows: np.ndarray, seed: int, fractions: tuple[float, float, float]) -> Split:
    """A client's rows (n,), shuffled by the client's own seed and cut into three parts."""
    rows = np.random.default_rng(derive(seed, "split", client)).permutation(rows)
    tested = max(round(fractions[2] * len(rows)), min(2, len(rows) // 2))
    validated = round(fractions[1] * len(rows))
    test, validation, train = np.split(rows, [tested, tested + validated])
    if not (len(test) and len(train)):
        raise FedtriError(
            f'partition "{spec}": {client} has {len(rows)} examples, {len(train)} to train and {len(test)} '
            f"to test on, expected at least 1 each; take fewer clients or more examples"
        )
    return Split(np.sort(train), np.sort(validation), np.sort(test))


def deal(pool: Pool, spec: str, clients: int | None, seed: int) -> dict[str, np.ndarray]:
    """The rows (n,) of every client."""
    # Imported here and below because the import takes 1 to 2 s, and only a run needs it.
    from flwr_datasets.partitioner import IidPartitioner, PathologicalPartitioner

    rows = pool.table.num_rows
    kind, _, argument = spec.partition(":")
    if kind == "natural":
        return natural(pool, spec, argument, clients)
    if clients is None or clients < 1:
        raise FedtriError(f'clients: expected at least 1 for partition "{spec}", got {clients}')
    if clients > rows:
        raise FedtriError(f"clients: expected at most the {rows} examples of {pool.name}, got {clients}")
    order = np.random.default_rng(derive(seed, "deal")).permutation(rows)
    if (labels := pool.labels) is None and kind in ("dirichlet", "pathological"):
        raise FedtriError(
            f'partition "{spec}": {pool.name} has no labels to deal by; name the column that holds classes or domains '
            'with columns.label, or take "iid" or "natural:COLUMN"'
        )
    table = datasets.Dataset.from_dict({"row": order} | ({} if labels is None else {"label": labels[order]}))
    drawn = derive(seed, kind)
    match kind:
        case "iid" if not argument:
            parts = load(IidPartitioner(clients), table, clients)
        case "dirichlet":
            alpha = number(spec, argument, float, "above 0 and at most 1e6", lambda a: 0 < a <= 1e6)
            parts = dirichlet(spec, alpha, table, clients, drawn)
        case "pathological":
            classes = len(np.unique(table["label"][:]))
            k = number(spec, argument, int, f"from 1 to the {classes} classes", lambda k: 1 <= k <= classes)
            try:
                dealer = PathologicalPartitioner(clients, "label", k, "first-deterministic", seed=drawn)
                parts = load(dealer, table, clients)
            except ValueError as error:
                raise FedtriError(
                    f'partition "{spec}": {clients} clients need a class more often than it has examples in '
                    f"{pool.name}; take fewer clients or more examples"
                ) from error
        case _:
            raise FedtriError(f'partition: expected {SPECS}, got "{spec}"')
    width = max(2, len(str(clients - 1)))
    return {f"client-{index:0{width}}": part for index, part in enumerate(parts)}


def dirichlet(spec: str, alpha: float, table: datasets.Dataset, clients: int, seed: int) -> list[np.ndarray]:
    """Every client's rows. Draws again, up to ten times, while a client has fewer than `ENOUGH`; then with `LEAST`."""
    from flwr_datasets.partitioner import DirichletPartitioner

    for least in (ENOUGH, LEAST):
        if least * clients > table.num_rows:
            continue
        try:
            return load(DirichletPartitioner(clients, "label", alpha, least, seed=seed), table, clients)
        except ValueError:
            continue
    raise FedtriError(
        f'partition "{spec}": every draw left one of {clients} clients with fewer than {LEAST} of '
        f"{table.num_rows} examples, so without one to train or to test on; take a larger number, fewer "
        "clients or more examples"
    )


def natural(pool: Pool, spec: str, column: str, clients: int | None) -> dict[str, np.ndarray]:
    """One client for each value. Its id is the value; characters that a file name should not hold become %XX."""
    from flwr_datasets.partitioner import GroupedNaturalIdPartitioner

    if column not in pool.table.column_names:
        found = ", ".join(pool.table.column_names)
        raise FedtriError(f'partition "{spec}": {pool.name} has no column "{column}", found {found}')
    values = pool.table[column][:]
    if None in values or "" in values:
        raise FedtriError(f'partition "{spec}": column "{column}" is empty in some rows; fill these in or remove them')
    ids = [re.sub(r"^\.", "%2E", quote(str(value), safe="")) for value in values]
    names = sorted(set(ids))
    if clients not in (None, len(names)):
        raise FedtriError(f'clients: column "{column}" holds {len(names)} clients, got {clients}; leave clients out')
    table = datasets.Dataset.from_dict({"row": np.arange(len(ids)), "client": ids})
    # Groups of one client, because NaturalIdPartitioner itself prints a progress bar.
    parts = load(GroupedNaturalIdPartitioner("client", 1, sort_unique_ids=True), table, len(names))
    return dict(zip(names, parts, strict=True))


def load(partitioner: Any, table: datasets.Dataset, count: int) -> list[np.ndarray]:
    """The pool's row indices in every part. Warnings of flwr-datasets are silenced: our own checks cover them."""
    # [:] here and elsewhere: to iterate over a column of `datasets` decodes it cell by cell, 20 times slower
    partitioner.dataset = table
    with warnings.catch_warnings(action="ignore"):
        return [np.asarray(partitioner.load_partition(part)["row"][:]) for part in range(count)]


def number(spec: str, text: str, kind: type[N], expected: str, fits: Callable[[N], bool]) -> N:
    """The number after the colon. Raises FedtriError if it is none, or does not fit."""
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or not fits(value):
        raise FedtriError(f'partition "{spec}": expected a number {expected} after the colon, got "{text}"')
    return value
