"""Every method runs from every basis that it says it can use."""

import pytest
import torch

from fedtri.methods import METHODS
from tiny import NEEDS, Lab, clients_tensors, rounds

PAIRS = [
    (name, basis) for name, make in METHODS.items() for basis in ("gradient", "weights")
    if basis in make().adapter.bases
]  # fmt: skip
OPTIONS = {"flexlora": {"align": True}, "flora_na": {"align": True}}
"""Rotated to what was shared before, which in the first round is A alone."""


@pytest.mark.parametrize(("method", "basis"), PAIRS)
def test_two_rounds_from_a_basis(method: str, basis: str, lab: Lab, tmp_path):
    """Half of the clients, so that some join later. Seen to fail where a method takes a shared A for a shared pair."""
    built = lab.federation(
        tmp_path, method=method, basis=basis, fraction=0.5, evaluate=False, method_options=OPTIONS.get(method, {}),
        **NEEDS.get(method, {}),
    )  # fmt: skip
    *_, last = rounds(built)
    assert torch.isfinite(torch.tensor(last.line["loss"]))
    assert all(value.isfinite().all() for own in clients_tensors(built).values() for value in own.values())
