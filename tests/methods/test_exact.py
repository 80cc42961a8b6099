"""What the server makes of replies, by numbers small enough to check by hand: one layer, d_in = 3, d_out = 2."""

import pytest
import torch
from torch import Tensor

from fedtri.adapters.layout import Key
from fedtri.aggregation import fidelity, means, pairs, products
from fedtri.federation import server
from fedtri.messages import Reply
from fedtri.methods import METHODS, build
from fedtri.state import Scales, ServerState
from replies import ALPHA, DOUBLE, drawn, product, reply, step

ONE = reply("one", 1, A=[[1, 0, 0]], B=[[2], [0]])  # BA = 2 in the upper left
TWO = reply("two", 3, A=[[0, 0, 1]], B=[[0], [4]])  # BA = 4 in the lower right
MEAN = torch.tensor([[0.5, 0, 0], [0, 0, 3]], **DOUBLE)  # p = 1/4, 3/4


def test_fedit_is_the_mean_of_factors_weighted_once_each():
    """A weight on both A and B must not square; a weight that is dropped would give client 0's or the plain mean."""
    shared = step("fedit", ONE, TWO).shared
    assert shared[Key("w", "A")].tolist() == [[0.25, 0, 0.75]]
    assert shared[Key("w", "B")].tolist() == [[0.5], [3.0]]


@pytest.mark.parametrize("method", ["flora", "fedex_lora"])
def test_the_dense_total_makes_the_mean_product_exact_at_the_clients_scale(method):
    """s = alpha / rank = 6. On a d_out = 2, d_in = 3 layer a transposed residual cannot even be added."""
    state = step(method, ONE, TWO, weights="examples")
    W = state.shared[Key("w", "W")]
    pair = product(state.shared) if method == "fedex_lora" else torch.zeros(2, 3, **DOUBLE)
    torch.testing.assert_close(W + ALPHA * pair, ALPHA * MEAN, atol=1e-10, rtol=0)


@pytest.mark.parametrize("method", ["flora", "fedex_lora"])
def test_the_dense_total_runs_on_and_reaches_who_missed_a_round(method):
    first = step(method, ONE, TWO)
    second = step(method, ONE, state=first.with_(scales=Scales(ALPHA, {"one": 1, "two": 1, "late": 1})))
    growth = second.shared[Key("w", "W")] - first.shared[Key("w", "W")]
    pair = product(second.shared) if method == "fedex_lora" else torch.zeros(2, 3, **DOUBLE)
    torch.testing.assert_close(growth + ALPHA * pair, ALPHA * product(ONE.up), atol=1e-10, rtol=0)
    down = server.downlink(build(method), second, "late")
    assert torch.equal(down[Key("w", "W")], second.shared[Key("w", "W")])


@pytest.mark.parametrize("method", ["fed_sb", "ravan"])
def test_the_mean_of_cores_is_the_mean_of_products(method):
    """C of two 1 x 1 heads, or of one column: ΔW is linear in C."""
    cores = [[[1.0], [2.0]], [[5.0], [-2.0]]]
    replies = [reply(name, n, C=core) for name, n, core in zip("ab", (1, 3), cores, strict=True)]
    assert step(method, *replies, weights="examples").shared[Key("w", "C")].tolist() == [[4.0], [-1.0]]
    assert step(method, *replies).shared[Key("w", "C")].tolist() == [[3.0], [0.0]], "uniform, as their papers have it"


def test_flexlora_sends_the_best_approximation_of_the_mean_product():
    """The mean is diag(0.5, 3): of rank one the nearest is the 3."""
    best = torch.tensor([[0.0, 0, 0], [0, 0, 3]], **DOUBLE)
    torch.testing.assert_close(product(step("flexlora", ONE, TWO).shared), best, atol=1e-10, rtol=0)


def test_flexlora_s_other_split_gives_a_orthonormal_rows_and_b_the_rest():
    """The same product. Rows of A beyond the rank of the mean are zero either way: there a client keeps its own."""
    replies = drawn(seed=5)
    found, plain = (step("flexlora", *replies, split=split).shared for split in ("orthonormal", "balanced"))
    torch.testing.assert_close(product(found), product(plain))
    A, B = found[Key("w", "A")], found[Key("w", "B")]
    torch.testing.assert_close(A @ A.mT, torch.eye(2, **DOUBLE))
    gram = B.mT @ B
    torch.testing.assert_close(gram, gram.diagonal().diag(), atol=1e-10, rtol=0)
    single = step("flexlora", reply("x", A=[[1, 0, 0], [2, 0, 0]], B=[[1, 1], [0, 0]]), split="orthonormal").shared
    assert single[Key("w", "A")][1].tolist() == [0, 0, 0]


def test_hetlora_weighs_by_the_norm_of_the_update():
    """‖B_1A_1‖ = 2 and ‖B_2A_2‖ = 4: weights 1/3 and 2/3, whatever the numbers of examples."""
    shared = step("hetlora", ONE, TWO).shared
    torch.testing.assert_close(shared[Key("w", "A")], torch.tensor([[1 / 3, 0, 2 / 3]], **DOUBLE))


def test_lora_fair_corrects_b_alone_and_points_more_truly():
    fair, plain = step("lora_fair", ONE, TWO, lam=1e-3).shared, step("fedit", ONE, TWO).shared
    assert torch.equal(fair[Key("w", "A")], plain[Key("w", "A")])
    cosine = [torch.nn.functional.cosine_similarity(product(x).flatten(), MEAN.flatten(), 0) for x in (fair, plain)]
    assert cosine[0] > cosine[1]


def test_flora_na_is_nearer_than_fedit_and_no_nearer_than_the_best_of_its_rank():
    def miss(method: str) -> float:
        return float(
            (product(step(method, *drawn(seed=3), weights="examples").shared) - mean_product(drawn(seed=3))).norm()
        )

    assert miss("flexlora") <= miss("flora_na") <= miss("fedit")


def mean_product(replies: list[Reply], alpha: float | None = None) -> Tensor:
    weights = means.example_weights(replies)
    rank = [r.up[Key("w", "A")].shape[0] for r in replies]
    scales = [1.0 if alpha is None else alpha / r for r in rank]
    return sum((p * s * product(r.up) for p, s, r in zip(weights, scales, replies, strict=True)), torch.zeros(()))


@pytest.mark.parametrize("method", [name for name in METHODS if build(name).adapter.mixed_ranks])
def test_alpha_over_rank_is_right_at_both_ends_where_ranks_differ(method):
    """One rank-1 update sent by clients of ranks 1, 2 and 3: each gets it back at its own scale."""
    update = torch.tensor([[2.0], [1.0], [0.0], [-1.0]], **DOUBLE) @ torch.tensor([[1.0, 0, 2, 0, 1]], **DOUBLE)
    U, S, Vh = torch.linalg.svd(update)
    replies = []
    for i, rank in enumerate((1, 2, 3)):
        scale = ALPHA / rank
        A, B = torch.zeros(rank, 5, **DOUBLE), torch.zeros(4, rank, **DOUBLE)
        A[0], B[:, 0] = Vh[0], U[:, 0] * S[0] / scale
        replies.append(Reply(f"c{i}", 0, {Key("w", "A"): A, Key("w", "B"): B}, 1, {}))
    state = step(method, *replies)
    for i, rank in enumerate((1, 2, 3)):
        down = server.downlink(build(method), state, f"c{i}")
        if method == "flora":
            torch.testing.assert_close(down[Key("w", "W")], update, atol=1e-10, rtol=0)
            continue
        assert down[Key("w", "A")].shape == (rank, 5)
        torch.testing.assert_close(ALPHA / rank * product(down), update, atol=1e-9, rtol=0)


def test_flexlora_gives_each_client_the_best_of_its_own_rank():
    replies = drawn(seed=5, ranks=(1, 2, 3))
    state, mean = step("flexlora", *replies), mean_product(replies, ALPHA)
    U, S, Vh = torch.linalg.svd(mean)
    for i, rank in enumerate((1, 2, 3)):
        got = ALPHA / rank * product(server.downlink(build("flexlora"), state, f"c{i}"))
        torch.testing.assert_close(got, U[:, :rank] * S[:rank] @ Vh[:rank], atol=1e-10, rtol=0)


@pytest.mark.parametrize("method", ["flexlora", "flora_na"])
def test_alignment_keeps_the_product_and_turns_the_factors_less(method):
    first = step(method, *drawn(seed=7))
    moved = [
        r.__class__(r.client, 1, {k: v * 1.01 for k, v in r.up.items()}, r.num_examples, {}) for r in drawn(seed=8)
    ]
    plain, aligned = (step(method, *moved, state=first, align=align) for align in (False, True))
    torch.testing.assert_close(product(plain.shared), product(aligned.shared), atol=1e-10, rtol=0)
    distance = [
        sum(float((s.shared[k] - first.shared[k]).square().sum()) for k in first.shared) for s in (plain, aligned)
    ]
    assert distance[1] <= distance[0] + 1e-12


@pytest.mark.parametrize("method", ["fedit", "flexlora", "flora_na", "hetlora", "lora_fair", "flora", "fedex_lora"])
def test_rho_is_the_dense_residual(method):
    replies = drawn(seed=11)
    after = step(method, *replies, weights="examples")
    mean, growth = ALPHA / 2 * mean_product(replies), after.shared.get(Key("w", "W"), torch.zeros(4, 5, **DOUBLE))
    pair = ALPHA / 2 * product(after.shared) if Key("w", "A") in after.shared else torch.zeros(4, 5, **DOUBLE)
    U, S, Vh = torch.linalg.svd(mean)
    best = U[:, :2] * S[:2] @ Vh[:2]
    rho = fidelity.rho(ServerState(scales=Scales(ALPHA)), after, replies)
    assert rho["exact"]["w"] == pytest.approx(float((mean - pair - growth).norm() / mean.norm()), rel=1e-5, abs=1e-12)
    assert rho["best_rank_r"]["w"] == pytest.approx(
        float((best - pair - growth).norm() / best.norm()), rel=1e-5, abs=1e-12
    )
    if method in ("flora", "fedex_lora"):
        assert rho["exact"]["w"] < 1e-10


def test_rho_is_silent_where_no_pair_travels():
    replies = [reply("a", C=[[1.0]]), reply("b", C=[[2.0]])]
    assert fidelity.logged(ServerState(), step("fed_sb", *replies), replies) == {}


def test_a_padded_client_changes_no_product():
    group = pairs.pairs(ServerState(), drawn(seed=1, ranks=(1, 3, 2)))[0]
    assert group.A.shape == (1, 3, 3, 5)
    for i, (r, rank) in enumerate(zip(drawn(seed=1, ranks=(1, 3, 2)), (1, 3, 2), strict=True)):
        torch.testing.assert_close(group.scale * group.B[0, i] @ group.A[0, i], product(r.up) / rank)
    assert products.product_norm(group.B, group.A).shape == (1, 3)
