"""Laws of a whole federation in one process: who its clients are, what they are called, and what a caller hears."""

import csv
import json
from pathlib import Path

import pytest

from fedtri.errors import FedtriError
from fedtri.messages import POOLED
from fedtri.runs import lifecycle
from fedtri.storage import run_directory
from tiny import clients_tensors, rounds, save_data


def named(folder: Path, names: list[str]) -> dict:
    """A federation's data with a column of clients' names."""
    path = save_data(folder / "named.csv", 30 * len(names))
    with path.open(newline="") as file:
        head, *rows = list(csv.reader(file))
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([[*head, "who"], *([*row, names[i % len(names)]] for i, row in enumerate(rows))])
    return {"data": str(path), "partition": "natural:who", "clients": None}


@pytest.mark.parametrize("method", ["centralized", "fedit"])
def test_a_client_may_be_called_pooled(method, lab, tmp_path):
    """Also as the pseudo-client is. Seen to fail with the pseudo-client called "pooled": the client took no part."""
    built = lab.federation(tmp_path / "clients", method=method, **named(tmp_path, ["pooled", POOLED, "else"]))
    assert built.spec.clients == ("%28pooled%29", "else", "pooled")
    last = list(rounds(built))[-1]
    assert set(last.line["accuracy"]["clients"]) == set(built.spec.clients)
    heard = last.line["bytes"]["up"]
    assert "pooled" in heard
    assert (POOLED in heard) == (method == "centralized")


def test_no_clients_tensors_are_anothers(lab, tmp_path):
    """Ditto keeps a second model of a beside its own. Seen to fail with that kept as "a.personal"."""
    names = ["a", "a.personal", "a.lost"]
    values = {"method": "ditto", "wire__up": "int8", **named(tmp_path, names)}
    built = lab.federation(tmp_path / "clients", **values)
    list(rounds(built))
    own = clients_tensors(built)
    assert sorted(own) == sorted(names)
    assert len(built.site.store.current) == 4 * len(names)
    assert len({str(saved.file) for saved in built.site.store.current.values()}) == 4 * len(names)


def test_early_stopping_needs_validation_examples(lab, tmp_path):
    shares = {"split__train": 0.8, "split__validation": 0.0, "split__test": 0.2}
    with pytest.raises(FedtriError, match=r"early_stopping.patience: needs validation examples; set split.validation"):
        lab.federation(tmp_path, early_stopping__patience=1, **shares)
    few = {"split__train": 0.79, "split__validation": 0.01, "split__test": 0.2}
    with pytest.raises(FedtriError, match=r"needs validation examples, and there are none"):
        lab.federation(tmp_path, early_stopping__patience=1, **few)


def test_a_caller_hears_of_every_phase_and_of_every_step_by_the_clients_name(lab, tmp_path):
    phases, steps = [], []
    listener = lifecycle.Listener(
        on_phase=lambda round, phase, clients: phases.append((round, phase, len(clients))),
        on_step=lambda client, step, loss: steps.append((client, step)),
    )
    list(lifecycle.run(lab.config(method="ce_lora", clients=2, rounds=1, steps=2, out=str(tmp_path / "run")), listener))
    assert phases == [(0, "sketch", 2), (0, "train", 2), (0, "evaluate", 2)]
    assert sorted(steps) == [(client, step) for client in ("client-00", "client-01") for step in (1, 2)]
    said = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert "executor" in said["executor"]
    assert run_directory.read_clients(tmp_path / "run") == ["client-00", "client-01"]
