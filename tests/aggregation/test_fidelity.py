"""When ρ is computed at all; what it is, tests/methods/test_exact.py says."""

import torch

from fedtri.adapters.layout import Key
from fedtri.aggregation import fidelity
from fedtri.federation import server
from fedtri.messages import Reply
from fedtri.methods import build
from fedtri.state import ServerState

RANK = 8


def logged(clients: int) -> dict:
    """The ρ that a round of FedIT with so many clients logs."""
    draws = torch.randn(clients, 2, RANK, RANK, generator=torch.Generator().manual_seed(0))
    replies = [
        Reply(f"c{i:03}", 0, {Key("w", "A"): A, Key("w", "B"): B}, 1, {}) for i, (A, B) in enumerate(draws.unbind())
    ]
    before = ServerState()
    return fidelity.logged(before, server.server_step(build("fedit", head="personal"), before, replies), replies)


def test_rho_is_left_out_where_its_svd_would_cost_more_than_the_round():
    """Clients times rank of 1,024 are computed, 1,032 are not. Seen to fail with the comparison to LARGEST removed."""
    assert fidelity.LARGEST == 1024
    assert logged(128)["rho"]["exact"].keys() == {"w"}
    assert logged(129) == {}
