"""FLoRA-NA: the pair Σq_uB_u, Σp_vA_v whose product is nearest to the mean of the products. arXiv:2509.26399.

min over p, q of ‖ Σ_k w_k B_kA_k − (Σ_u q_uB_u)(Σ_v p_vA_v) ‖_F², w_k = 1/m, from p = q = w (which is FedIT of that w).
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from fedtri.aggregation import means, pairs
from fedtri.errors import FedtriError
from fedtri.messages import Reply
from fedtri.method import AdapterSpec, Method, Paper, Plan
from fedtri.state import ServerState

PAPER = Paper(
    "FLoRA-NA",
    "FLoRA-NA: Nearly Accurate Aggregation for Federated Low-Rank Adaptation",
    2025,
    "https://arxiv.org/abs/2509.26399",
)

RIDGE = 1e-10
"""Of a proximal step, relative to the mean eigenvalue: damps what is undetermined, biases nothing."""


def flora_na(*, sweeps: int = 100, align: bool = False) -> Method:
    """Learns, sends and receives A, B and H, of any ranks: smaller ones are zero-padded, and cut on the way down.

    sweeps: at most so many alternating solves. align: rotate the pair to the basis of the round before (Procrustes).
    """
    if sweeps < 1:
        raise FedtriError(f"method_options.sweeps: expected at least 1, got {sweeps}")
    plan = Plan.of(train="ABH", up="ABH", down="ABH")

    def aggregate(state: ServerState, replies: Sequence[Reply]) -> ServerState:
        weights = means.example_weights(replies)

        def solve(group: pairs.Pairs) -> pairs.Pair:
            B, A, _, _ = nearest_average(group.B, group.A, weights, sweeps=sweeps)
            return pairs.aligned(state, group, B, A) if align else (B, A)

        return pairs.share_pairs(state, replies, solve)

    return Method(
        "flora_na",
        PAPER,
        lambda _: plan,
        aggregate,
        receive=pairs.revive,
        adapter=AdapterSpec(kinds=("lora", "dora", "hira"), mixed_ranks=not align),
        weights="uniform",
    )


def nearest_average(
    B: Float[Tensor, "layers m d_out r"],
    A: Float[Tensor, "layers m r d_in"],
    weights: Float[Tensor, "m"],
    *,
    sweeps: int = 100,
    tolerance: float = 1e-11,
) -> tuple[
    Float[Tensor, "layers d_out r"],
    Float[Tensor, "layers r d_in"],
    Float[Tensor, "layers m"],
    Float[Tensor, "layers m"],
]:
    """B̂ = Σq_uB_u, Â = Σp_vA_v, p and q at a local minimum of ‖M − B̂Â‖_F² (FLoRA-NA, arXiv:2509.26399).

    With p fixed the objective ‖M‖² − 2qᵀcp + qᵀNq is quadratic in q, and the other way round, where c[u, v] =
    ⟨M, B_uA_v⟩. Each half sweep is the proximal step (N + εI)δ = cp − Nq, q ← q + δ: never uphill, also where N is
    singular, and free of a ridge's bias. It starts at p = q = weights, so no layer ends above FedAvg.

    A layer stops when neither B̂ nor Â moves by more than `tolerance` of its norm. Where clients' A are nearly equal,
    p can still move much while the objective hardly falls: to stop by the objective would leave Â to rounding.

    Returns:
        B̂, Â in the dtype of B and A, and p, q in float64. Cost: `gram_blocks`, then O(m²r² + m³) a half sweep.
    """
    GB, GA = gram_blocks(B, A)
    inner_B, inner_A = (G.diagonal(dim1=3, dim2=4).sum(-1) for G in (GB, GA))  # ⟨B_u, B_v⟩ and ⟨A_u, A_v⟩
    w = weights.double().expand(len(B), -1)
    # (layers, u, k a b) @ (layers, k a b, v)
    target = (GB.transpose(1, 2) * w[:, None, :, None, None]).flatten(2) @ GA.transpose(1, 2).flatten(2).mT
    energy = (w * target.diagonal(dim1=1, dim2=2)).sum(-1)  # ‖M‖²

    def objective(p: Tensor, q: Tensor) -> Tensor:
        N = normal_matrix(GA, GB, q)
        return energy + (p * ((N @ p[..., None] - 2 * target.mT @ q[..., None])[..., 0])).sum(-1)

    p, q, active = w, w, torch.ones(len(B), 1, dtype=torch.bool)
    for _ in range(sweeps):
        step_q = _step(normal_matrix(GB, GA, p), target, p, q) * active
        q = q + step_q
        step_p = _step(normal_matrix(GA, GB, q), target.mT, q, p) * active
        p = p + step_p
        moves_B = _length(inner_B, step_q) > tolerance * _length(inner_B, q)
        moves_A = _length(inner_A, step_p) > tolerance * _length(inner_A, p)
        active = active & (moves_B | moves_A)[:, None]
        if not active.any():
            break
    worse = (objective(p, q) > objective(w, w))[:, None]
    p, q = torch.where(worse, w, p), torch.where(worse, w, q)
    return _combined(q, B), _combined(p, A), p, q


def gram_blocks(
    B: Float[Tensor, "layers m d_out r"], A: Float[Tensor, "layers m r d_in"]
) -> tuple[Float[Tensor, "layers m m r r"], Float[Tensor, "layers m m r r"]]:
    """GB[u, v] = B_uᵀB_v and GA[u, v] = A_uA_vᵀ in float64: two (mr × mr) products, O((d_out + d_in)(mr)²).

    All else that depends on p and q costs O(m²r²). Memory: 16 (mr)² bytes a layer.
    """
    return _gram(B.mT), _gram(A)


def _gram(X: Float[Tensor, "layers m r d"]) -> Float[Tensor, "layers m m r r"]:
    rows = X.double().flatten(1, 2)  # (layers, mr, d)
    return (rows @ rows.mT).unflatten(2, X.shape[1:3]).unflatten(1, X.shape[1:3]).transpose(2, 3).contiguous()


def normal_matrix(
    own: Float[Tensor, "layers m m r r"], other: Float[Tensor, "layers m m r r"], p: Float[Tensor, "layers m"]
) -> Float[Tensor, "layers m m"]:
    """N[u, u'] = Σ_vv' p_v p_v' tr(own[u, u'] · other[v', v]): ‖(Σ_u q_uB_u)(Σ_v p_vA_v)‖² = qᵀNq.

    The inner sum is ĀĀᵀ, an r × r matrix, so N costs O(m²r²) and the m⁴ traces are never needed.
    """
    pairs = (p[:, :, None] * p[:, None, :]).flatten(1)  # (layers, mm)
    inner = pairs[:, None] @ other.flatten(1, 2).flatten(2)  # (layers, 1, rr)
    return (own.flatten(1, 2).flatten(2) @ inner.mT).view(own.shape[:3])


def _step(
    N: Float[Tensor, "layers m m"],
    target: Float[Tensor, "layers m m"],
    other: Float[Tensor, "layers m"],
    own: Float[Tensor, "layers m"],
) -> Float[Tensor, "layers m"]:
    """δ of the proximal step (N + εI)δ = target · other − N · own."""
    ridge = RIDGE * N.diagonal(dim1=1, dim2=2).mean(-1) + torch.finfo(N.dtype).tiny
    N_ridge = N + ridge[:, None, None] * torch.eye(N.shape[-1], dtype=N.dtype)
    gap = target @ other[..., None] - N @ own[..., None]
    return torch.cholesky_solve(gap, torch.linalg.cholesky_ex(N_ridge).L)[..., 0]


def _length(inner: Float[Tensor, "layers m m"], q: Float[Tensor, "layers m"]) -> Float[Tensor, "layers"]:
    """‖Σ q_uX_u‖_F, given the inner products of the X_u."""
    return (q * (inner @ q[..., None])[..., 0]).sum(-1).clamp(min=0).sqrt()


def _combined(q: Float[Tensor, "layers m"], X: Float[Tensor, "layers m a b"]) -> Float[Tensor, "layers a b"]:
    return (q.to(X.dtype)[:, None] @ X.flatten(2)).view(len(X), *X.shape[2:])
