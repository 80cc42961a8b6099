"""Laws of every partition, and what each of the four promises."""

import random

import datasets
import numpy as np
import pytest

from fedtri.data.partition import partition
from fedtri.data.pool import Pool
from fedtri.errors import FedtriError


def pool(rows: int = 400, classes: int = 4) -> Pool:
    columns = {
        "text": [f"text {row}" for row in range(rows)],
        "label": [row % classes for row in range(rows)],
        "user": [f"../u{(rows - 1 - row) // 40}" for row in range(rows)],
        "hole": [None if row == 7 else "x" for row in range(rows)],
    }
    return Pool("toy", datasets.Dataset.from_dict(columns), tuple("abcdefgh"[:classes]))


def rows_of(split) -> np.ndarray:
    return np.concatenate([split.train, split.validation, split.test])


def counts(pool: Pool, split) -> np.ndarray:
    return np.bincount(np.asarray(pool.table["label"])[rows_of(split)], minlength=len(pool.label_names))


SPECS = ["iid", "dirichlet:0.3", "dirichlet:1e6", "pathological:2", "natural:user"]


@pytest.mark.parametrize("spec", ["dirichlet:0.3", "pathological:2"])
def test_without_labels_there_is_nothing_to_skew(spec):
    bare = Pool("toy", pool().table.remove_columns("label"))
    for able in ("iid", "natural:user"):
        assert len(partition(bare, spec=able, clients=10, seed=0)) == 10
    with pytest.raises(FedtriError, match=r"toy has no labels to deal by; name the column .* with columns\.label"):
        partition(bare, spec=spec, clients=10, seed=0)


@pytest.mark.parametrize("spec", SPECS)
def test_every_row_goes_to_one_split_of_one_client(spec):
    splits = partition(pool(), spec=spec, clients=10, seed=0)
    assert sorted(np.concatenate([rows_of(split) for split in splits.values()])) == list(range(400))
    assert list(splits) == sorted(splits)
    assert all(len(split.train) >= 1 and len(split.test) >= 2 for split in splits.values())


@pytest.mark.parametrize("spec", SPECS)
def test_the_seed_alone_decides(spec):
    def rows(seed: int) -> list:
        return [split.train.tolist() for split in partition(pool(), spec=spec, clients=10, seed=seed).values()]

    np.random.seed(0)
    random.seed(0)
    before = np.random.get_state()
    first = rows(1)
    # Only numpy's: beartype itself draws from Python's global generator while it checks.
    np.testing.assert_equal(np.random.get_state(), before, "the global generator was used")
    np.random.seed(5)
    random.seed(5)
    assert rows(1) == first != rows(2)


@pytest.mark.parametrize("spec", SPECS)
def test_nothing_is_printed(spec, capfd, recwarn):
    partition(pool(), spec=spec, clients=10, seed=0)
    assert capfd.readouterr() == ("", "")
    assert not [warning for warning in recwarn if issubclass(warning.category, UserWarning)]


def test_fractions_hold_inside_each_client():
    splits = partition(pool(), spec="iid", clients=4, seed=0, fractions=(0.5, 0.2, 0.3))
    assert [len(s.train) for s in splits.values()] == [50] * 4
    assert [len(s.validation) for s in splits.values()] == [20] * 4
    assert [len(s.test) for s in splits.values()] == [30] * 4


def test_ids_sort_as_numbers():
    assert list(partition(pool(), spec="iid", clients=3, seed=0)) == ["client-00", "client-01", "client-02"]
    many = partition(pool(800), spec="iid", clients=101, seed=0)
    assert list(many)[::50] == ["client-000", "client-050", "client-100"]


def test_dirichlet_skews_and_a_large_number_does_not():
    toy = pool()
    skewed, even = (
        np.array([counts(toy, split) for split in partition(toy, spec=spec, clients=5, seed=0).values()])
        for spec in ("dirichlet:0.1", "dirichlet:1e6")
    )
    assert skewed.max() > 60
    assert (even == 20).mean() > 0.5
    assert abs(even - 20).max() <= 1


def test_pathological_gives_each_client_its_number_of_classes():
    toy = pool(classes=6)
    for split in partition(toy, spec="pathological:2", clients=6, seed=3).values():
        assert (counts(toy, split) > 0).sum() == 2


def test_natural_clients_are_the_values_made_safe_for_file_names():
    splits = partition(pool(120), spec="natural:user", clients=None, seed=0)
    assert list(splits) == ["%2E.%2Fu0", "%2E.%2Fu1", "%2E.%2Fu2"]
    assert sorted(rows_of(splits["%2E.%2Fu0"])) == list(range(80, 120))


def test_a_small_client_still_tests_on_two():
    (split,) = partition(pool(4, 2), spec="iid", clients=1, seed=0).values()
    assert (len(split.train), len(split.validation), len(split.test)) == (2, 0, 2)


BAD = {
    "unknown spec": ("random", 4, ['"random"', "natural:COLUMN"]),
    "iid takes no number": ("iid:3", 4, ['"iid:3"', "natural:COLUMN"]),
    "no number": ("dirichlet", 4, ["dirichlet", "number", '""']),
    "not a number": ("dirichlet:much", 4, ["dirichlet:much", '"much"']),
    "zero": ("dirichlet:0", 4, ["above 0"]),
    "not finite": ("dirichlet:nan", 4, ["above 0"]),
    "half a class": ("pathological:1.5", 4, ['"1.5"', "from 1 to the 4 classes"]),
    "more classes than there are": ("pathological:5", 4, ['"5"', "from 1 to the 4 classes"]),
    "more clients than examples": ("iid", 401, ["400 examples", "401"]),
    "a class too rare": ("pathological:4", 200, ["pathological:4", "200 clients"]),
    "no test example": ("iid", 300, ["client-100 has 1 examples", "0 to test"]),
    "too skewed": ("dirichlet:0.001", 30, ["dirichlet:0.001", "30 clients"]),
    "no clients": ("iid", 0, ["clients", "at least 1"]),
    "clients unsaid": ("iid", None, ["clients", "None"]),
    "no column": ("natural:nope", None, ['"nope"', "text, label, user"]),
    "hole in the column": ("natural:hole", None, ['"hole"', "empty"]),
    "another number of clients": ("natural:user", 3, ["clients", "10", "3"]),
    "one example a client": ("natural:text", None, ["natural:text", "0 to test"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_partitions_are_one_line_that_names_them(case):
    spec, clients, expected = BAD[case]
    with pytest.raises(FedtriError) as caught:
        partition(pool(), spec=spec, clients=clients, seed=0)
    message = str(caught.value)
    assert "\n" not in message
    assert all(part in message for part in expected), message


@pytest.mark.parametrize("fractions", [(0.7, 0.1, 0.1), (1.0, 0.0, 0.0), (0.0, 0.5, 0.5), (1.2, -0.4, 0.2)])
def test_bad_fractions(fractions):
    with pytest.raises(FedtriError, match="fractions"):
        partition(pool(), spec="iid", clients=4, seed=0, fractions=fractions)
