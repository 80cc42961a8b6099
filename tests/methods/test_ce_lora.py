"""CE-LoRA with numbers a hand can check."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import pytest
import torch

from fedtri import methods
from fedtri.adapters.layout import Key
from fedtri.errors import FedtriError
from fedtri.federation import server
from fedtri.messages import Mixture, Reply, Sketch
from fedtri.method import Plan
from fedtri.state import ServerState

CORE = Key("layer", "C")
EYE = torch.eye(2)
E = math.exp


def sketch(x: float) -> Sketch:
    one, at, spread = np.ones(1, np.float32), np.full((1, 1), x, np.float32), np.ones((1, 1), np.float32)
    return Sketch(np.array([9]), {0: Mixture(one, at, spread)})


def step(cores: dict[str, torch.Tensor], at: Sequence[float] = (0, 1, 3), state=None, **options) -> ServerState:
    """One aggregation of these cores of clients whose data lie at these places."""
    method = methods.build("ce_lora", options)
    state = state or ServerState()
    if method.welcome is not None and not state.sketches:
        said = [Reply(c, 0, {}, 9, {}, sketch(x)) for c, x in zip(sorted(cores), at, strict=False)]
        state = server.sketched(method, state, said)
    replies = [Reply(client, 0, {CORE: core}, 9, {}) for client, core in cores.items()]
    return server.server_step(method, state, replies)


def diagonal(*values: float) -> torch.Tensor:
    return torch.diag(torch.tensor(values, dtype=torch.float32))


def scalar(state: ServerState, client: str) -> float:
    """The top left number of a client's mixed core."""
    return float(state.personal[client][CORE][0, 0])


def found(state: ServerState) -> Mapping[str, torch.Tensor]:
    """The matrices of the round."""
    assert state.similarity is not None
    return state.similarity.matrices


THREE = {"a": 1 * EYE, "b": 2 * EYE, "c": 4 * EYE}


def test_data_similarity_alone_by_hand():
    """Distances 1, 2 and 3 between clients at 0, 1 and 3; their median is 2. Seen to fail with columns normalised."""
    state = step(THREE, similarity="data")
    near, mid, far = E(-1 / 2), E(-2 / 2), E(-3 / 2)
    assert scalar(state, "a") == pytest.approx((1 + near * 2 + far * 4) / (1 + near + far))
    assert scalar(state, "b") == pytest.approx((near * 1 + 2 + mid * 4) / (near + 1 + mid))
    assert scalar(state, "c") == pytest.approx((far * 1 + mid * 2 + 4) / (far + mid + 1))
    assert set(found(state)) == {"data", "weights"}
    torch.testing.assert_close(found(state)["weights"].sum(1), torch.ones(3))


def test_model_similarity_alone_by_hand():
    """a and b moved along one axis, c along the other: CKA of C − I is 1 between a and b, 0 to c."""
    cores = {"a": EYE + diagonal(1, 0), "b": EYE + diagonal(3, 0), "c": EYE + diagonal(0, 1)}
    state = step(cores, similarity="model", reference="init")
    torch.testing.assert_close(state.personal["a"][CORE], EYE + diagonal(2, 0))
    torch.testing.assert_close(state.personal["b"][CORE], EYE + diagonal(2, 0))
    torch.testing.assert_close(state.personal["c"][CORE], cores["c"])
    assert set(found(state)) == {"model", "weights"}


def test_the_raw_reference_compares_the_cores_themselves():
    """CKA of diag(2, 1) and diag(1, 2): (4, 1)·(1, 4) / 17 = 8/17, where their moves have nothing in common."""
    cores = {"a": diagonal(2, 1), "b": diagonal(1, 2)}
    raw, init = (step(cores, similarity="model", reference=reference) for reference in ("raw", "init"))
    weight = (8 / 17) / (1 + 8 / 17)
    torch.testing.assert_close(found(raw)["weights"], torch.tensor([[1 - weight, weight], [weight, 1 - weight]]))
    torch.testing.assert_close(found(init)["weights"], EYE)


def test_the_cosine_as_reference_leaves_out_who_moved_the_other_way():
    cores = {"a": EYE + diagonal(1, 0), "b": EYE - diagonal(1, 0), "c": EYE + diagonal(3, 0)}
    state = step(cores, similarity="model", reference="cosine")
    torch.testing.assert_close(state.personal["a"][CORE], EYE + diagonal(2, 0))
    torch.testing.assert_close(state.personal["b"][CORE], cores["b"])
    assert found(step(cores, similarity="model"))["weights"][0].tolist() == pytest.approx([1 / 3] * 3)


def test_in_a_frozen_basis_cores_start_at_zero_and_are_compared_as_they_are():
    """Seen to fail with I subtracted from what started at 0."""
    cores = {"a": diagonal(1, 0), "b": diagonal(3, 0), "c": diagonal(0, 2)}
    state = step(cores, similarity="model", frozen=True)
    torch.testing.assert_close(state.personal["a"][CORE], diagonal(2, 0))
    torch.testing.assert_close(state.personal["c"][CORE], diagonal(0, 2))


def test_both_are_summed():
    cores = {"a": EYE + diagonal(1, 0), "b": EYE + diagonal(3, 0), "c": EYE + diagonal(0, 1)}
    state = step(cores)
    data = torch.tensor([[1, E(-0.5), E(-1.5)], [E(-0.5), 1, E(-1)], [E(-1.5), E(-1), 1]])
    model = torch.tensor([[1.0, 1, 0], [1, 1, 0], [0, 0, 1]])
    total = data + model
    torch.testing.assert_close(found(state)["weights"], total / total.sum(1, keepdim=True))
    torch.testing.assert_close(found(state)["data"], data)
    torch.testing.assert_close(found(state)["model"], model)


def test_uniform_is_the_plain_mean_for_everyone():
    state = step(THREE, similarity="uniform")
    assert [scalar(state, client) for client in "abc"] == pytest.approx([7 / 3] * 3)


def layered(seed: int, groups: int) -> dict[str, dict[Key, torch.Tensor]]:
    """The cores of 12 clients in two layers; around `groups` centres."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(groups, 2, 6, 6, generator=generator)
    cores = torch.eye(6) + 0.01 * (centres[torch.arange(12) % groups] + torch.randn(12, 2, 6, 6, generator=generator))
    return {f"c{i:02}": {Key("x", "C"): core[0], Key("y", "C"): core[1]} for i, core in enumerate(cores)}


def test_shrunk_mixing_is_the_plain_mean_where_clients_are_alike():
    """And else lies between the mean and the paper's weights. A newcomer is mixed with the same λ."""
    method = methods.build("ce_lora", {"mixing": "shrunk", "reference": "cosine", "similarity": "model", "top_k": 4})
    shares = []
    for groups in (1, 3):
        replies = [Reply(client, 0, cores, 9, {}) for client, cores in layered(1, groups).items()]
        state = server.server_step(method, ServerState(), replies)
        weights, shares = found(state)["weights"], [*shares, float(state.own["share"])]
        torch.testing.assert_close(weights.sum(1), torch.ones(12))
        assert weights.min() == pytest.approx((1 - shares[-1]) / 12, abs=1e-6)
    assert shares[0] < 0.15
    assert shares[1] > 0.5


def test_one_layer_cannot_be_halved_so_shrunk_mixing_is_the_mean():
    state = step(THREE, mixing="shrunk")
    assert [scalar(state, client) for client in "abc"] == pytest.approx([7 / 3] * 3)


def test_a_newcomer_is_mixed_by_data_and_shrunk_alike():
    method = methods.build("ce_lora", {"mixing": "shrunk"})
    state = step(THREE, mixing="shrunk")
    state = server.sketched(method, state, [Reply("d", 1, {}, 9, {}, sketch(0.0))])
    assert scalar(state, "d") == pytest.approx(7 / 3)


def test_a_temperature_is_a_softmax():
    state = step(THREE, similarity="data", temperature=0.5)
    weights = [E(2 * s) for s in (1, E(-0.5), E(-1.5))]
    mixed = (weights[0] * 1 + weights[1] * 2 + weights[2] * 4) / sum(weights)
    assert scalar(state, "a") == pytest.approx(mixed)


def test_top_k_mixes_the_nearest_and_oneself():
    state = step(THREE, similarity="data", top_k=2)
    near, mid = E(-1 / 2), E(-2 / 2)
    assert scalar(state, "a") == pytest.approx((1 + near * 2) / (1 + near))
    assert scalar(state, "c") == pytest.approx((mid * 2 + 4) / (mid + 1))
    alone = step(THREE, similarity="data", top_k=1)
    assert [scalar(alone, client) for client in "abc"] == [1, 2, 4]


def test_the_number_of_examples_plays_no_part():
    """The paper's weights are similarities; seen to fail with p_k multiplied in."""
    replies = [Reply(c, 0, {CORE: core}, n, {}) for (c, core), n in zip(THREE.items(), (1, 10, 1000), strict=True)]
    state = server.server_step(methods.build("ce_lora", {"similarity": "uniform"}), ServerState(), replies)
    assert scalar(state, "a") == pytest.approx(7 / 3)


def test_who_was_seen_before_is_mixed_with_its_last_core():
    """b takes part in the second round only; a's core of the first still counts, and a's own mixture is renewed."""
    state = step({"a": 1 * EYE}, similarity="uniform")
    state = step({"b": 3 * EYE}, similarity="uniform", state=state)
    assert scalar(state, "a") == scalar(state, "b") == 2
    assert state.deliveries.personal == {"a": 2, "b": 2}
    state = step({"a": 5 * EYE}, similarity="uniform", state=state)
    assert scalar(state, "b") == 4


def test_the_mixture_is_linear_in_the_core_itself_whatever_the_reference():
    """Σ w_j C_j = I + Σ w_j (C_j − I), as rows sum to 1."""
    generator = torch.Generator().manual_seed(0)
    cores = {c: EYE + 0.1 * torch.randn(2, 2, generator=generator) for c in "abc"}
    state = step(cores)
    weights = found(state)["weights"]
    for i, client in enumerate("abc"):
        expected = sum(float(w) * cores[c] for w, c in zip(weights[i], "abc", strict=True))
        torch.testing.assert_close(state.personal[client][CORE], expected)


@pytest.mark.parametrize(
    ("options", "needs_sketch", "train"),
    [({}, True, "ABCH"), ({"similarity": "model"}, False, "ABCH"), ({"frozen": True}, True, "CH")],
)
def test_what_ce_lora_asks_for(options, needs_sketch, train):
    method = methods.build("ce_lora", options)
    assert method.plan(0) == method.plan(7) == Plan.of(train=train, up="C", down="C")
    assert (method.welcome is not None) == needs_sketch
    assert (method.adapter.basis == "orthonormal") == (options.get("frozen", False))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"reference": "first"}, "method_options.reference"),
        ({"similarity": "none"}, "method_options.similarity"),
        ({"mixing": "mean"}, "method_options.mixing"),
        ({"temperature": 0.0}, "method_options.temperature"),
        ({"temperature": -1.0}, "method_options.temperature"),
        ({"top_k": 0}, "method_options.top_k"),
        ({"topk": 3}, "method_options.topk"),
    ],
)
def test_options_out_of_range_are_named(options, said):
    with pytest.raises(FedtriError) as caught:
        methods.build("ce_lora", options)
    assert str(caught.value).startswith(said)
    assert "\n" not in str(caught.value)
