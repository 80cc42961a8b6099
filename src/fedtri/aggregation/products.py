"""The server's mathematics on sums of products M = Σ_k w_k B_kA_k, kept in factors.

No d_out × d_in matrix is built unless the stacked factors are themselves that wide.

Shapes: B (layers, m, d_out, r), A (layers, m, r, d_in), weights (m,): m clients, every layer of one shape
at once. A client of smaller rank is zero-padded to r, which changes no product; a scale s_k is folded
into B or the weights by the caller. Any float dtype goes in and comes out; in between all is float64, in
which a Gram matrix of float32 factors is exact to their precision, and which costs little beside the
copies.

Sources: Golub & Van Loan, Matrix Computations, §5.2 (QR) and §6.4 (Procrustes); arXiv:2509.26399 (FLoRA-NA);
arXiv:2411.14961 (LoRA-FAIR).
"""

from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from fedtri.errors import FedtriError

RIDGE = 1e-10
"""Of a proximal step, relative to the mean eigenvalue: damps what is undetermined, biases nothing."""


def stacked(
    B: Float[Tensor, "layers m d_out r"], A: Float[Tensor, "layers m r d_in"], weights: Float[Tensor, "m"]
) -> tuple[Float[Tensor, "layers d_out m*r"], Float[Tensor, "layers m*r d_in"]]:
    """[w_1B_1 … w_mB_m] and [A_1; …; A_m], whose product is M exactly; the weight sits on one side only.

    The left stack is laid out column by column, as LAPACK wants it.
    """
    weighted = B * weights.to(B.dtype)[:, None, None]
    return weighted.mT.flatten(1, 2).mT, A.flatten(1, 2)


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


def product_inner(
    B1: Float[Tensor, "*batch d_out r1"],
    A1: Float[Tensor, "*batch r1 d_in"],
    B2: Float[Tensor, "*batch d_out r2"],
    A2: Float[Tensor, "*batch r2 d_in"],
) -> Float[Tensor, "*batch"]:
    """⟨B₁A₁, B₂A₂⟩ = Σ (B₁ᵀB₂) ∘ (A₁A₂ᵀ), float64, O((d_out + d_in) r₁r₂)."""
    return ((B1.double().mT @ B2.double()) * (A1.double() @ A2.double().mT)).sum((-2, -1))


def product_norm(B: Float[Tensor, "*batch d_out r"], A: Float[Tensor, "*batch r d_in"]) -> Float[Tensor, "*batch"]:
    """‖BA‖_F of every pair in the batch: of each client and layer, given (layers, m, …). float64."""
    return product_inner(B, A, B, A).clamp(min=0).sqrt()


def product_cosine(
    B1: Float[Tensor, "*batch d_out r1"],
    A1: Float[Tensor, "*batch r1 d_in"],
    B2: Float[Tensor, "*batch d_out r2"],
    A2: Float[Tensor, "*batch r2 d_in"],
) -> Float[Tensor, "*batch"]:
    """cos(B₁A₁, B₂A₂) as vectors of d_out·d_in entries; 0 where either product is zero. float64."""
    norms = product_norm(B1, A1) * product_norm(B2, A2)
    return torch.where(norms > 0, product_inner(B1, A1, B2, A2) / norms, 0.0)


def _triangle(
    X: Float[Tensor, "layers d k"],
) -> tuple[Float[Tensor, "layers n k"], Callable[[Tensor], Tensor]]:
    """R with RᵀR = XᵀX and n = min(d, k) rows, and U ↦ QU for X = QR.

    Q stays a product of reflectors, which halves the cost. A wide X is its own R: reducing it saves no
    row.
    """
    d, k = X.shape[-2:]
    if k >= d:
        return X, lambda U: U
    reflectors, tau = torch.geqrf(X)
    return reflectors[..., :k, :].triu(), lambda U: torch.ormqr(reflectors, tau, pad(U, (0, 0, 0, d - k)))


def product_svd(
    B: Float[Tensor, "layers m d_out r"],
    A: Float[Tensor, "layers m r d_in"],
    weights: Float[Tensor, "m"],
    rank: int,
) -> tuple[Float[Tensor, "layers d_out rank"], Float[Tensor, "layers n"], Float[Tensor, "layers rank d_in"]]:
    """The leading `rank` singular vectors of M and its min(mr, d_out, d_in) largest singular values, float64.

    [w_kB_k] = Q_B R_B and [A_k]ᵀ = Q_A R_A, so M = Q_B (R_B R_Aᵀ) Q_Aᵀ: the SVD is that of a core of at most
    mr × mr. Vectors there are none of are zero. Cost O((d_out + d_in)(mr)² + (mr)³).

    Raises:
        FedtriError: rank is below 1.
    """
    if rank < 1:
        raise FedtriError(f"rank: expected at least 1, got {rank}; give the number of columns B is to have")
    left, right = stacked(B.double(), A.double(), weights)
    RB, lift_left = _triangle(left)
    RA, lift_right = _triangle(right.mT)
    U, S, Vh = torch.linalg.svd(RB @ RA.mT, full_matrices=False)
    missing = max(0, rank - S.shape[-1])
    U, V = pad(U[..., :rank], (0, missing)), pad(Vh.mT[..., :rank], (0, missing))
    return lift_left(U), S, lift_right(V).mT


def best_low_rank(
    B: Float[Tensor, "layers m d_out r"],
    A: Float[Tensor, "layers m r d_in"],
    weights: Float[Tensor, "m"],
    rank: int,
    *,
    split: Literal["balanced", "left"] = "balanced",
) -> tuple[Float[Tensor, "layers d_out rank"], Float[Tensor, "layers rank d_in"]]:
    """B̂Â, the matrix of rank at most `rank` nearest to M (Eckart–Young), at the cost of `product_svd`.

    "balanced" gives √σ to each factor, so their gradients have one scale; "left" gives σ to B̂ and leaves Â
    orthonormal. Columns beyond M's own rank are zero.
    """
    U, S, Vh = product_svd(B, A, weights, rank)
    sigma = pad(S, (0, max(0, rank - S.shape[-1])))[..., None, :rank]  # (layers, 1, rank)
    power = 0.5 if split == "balanced" else 1.0
    return (U * sigma**power).to(B.dtype), (Vh * sigma.mT ** (1 - power)).to(A.dtype)


def truncated(
    B: Float[Tensor, "layers d_out r"], A: Float[Tensor, "layers r d_in"], rank: int
) -> tuple[Float[Tensor, "layers d_out rank"], Float[Tensor, "layers rank d_in"]]:
    """The best approximation of BA of another rank: truncated below r, zero-padded above."""
    return best_low_rank(B[:, None], A[:, None], torch.ones(1), rank)


def residual(
    B: Float[Tensor, "layers m d_out r"],
    A: Float[Tensor, "layers m r d_in"],
    weights: Float[Tensor, "m"],
    B_hat: Float[Tensor, "layers d_out k"],
    A_hat: Float[Tensor, "layers k d_in"],
) -> Float[Tensor, "layers"]:
    """ρ = ‖M − B̂Â‖_F / ‖M‖_F of each layer, float64; B̂Â may be a stack of any rank k.

    M − B̂Â = [w_kB_k, −B̂][A_k; Â] is itself a product of two stacks, whose norm is that of R_B R_Aᵀ. The
    Gram form ‖M‖² − 2⟨M, B̂Â⟩ + ‖B̂Â‖² costs a third but sees nothing below ρ ≈ 1e-8; this one is right
    down to 1e-15. Where M is zero, ρ is 0 if B̂Â is zero too and infinite otherwise. Cost O((d_out +
    d_in)(mr + k)²).
    """
    left, right = stacked(B.double(), A.double(), weights)
    RB, _ = _triangle(torch.cat([left, -B_hat.double()], -1))
    RA, _ = _triangle(torch.cat([right, A_hat.double()], -2).mT)
    mr = left.shape[-1]
    error = torch.linalg.matrix_norm(RB @ RA.mT)
    norm = torch.linalg.matrix_norm(RB[..., :mr] @ RA[..., :mr].mT)
    return torch.where(error == 0, 0.0, error / norm)


def normal_matrix(
    own: Float[Tensor, "layers m m r r"], other: Float[Tensor, "layers m m r r"], p: Float[Tensor, "layers m"]
) -> Float[Tensor, "layers m m"]:
    """N[u, u'] = Σ_vv' p_v p_v' tr(own[u, u'] · other[v', v]): ‖(Σ_u q_uB_u)(Σ_v p_vA_v)‖² = qᵀNq.

    The inner sum is ĀĀᵀ, an r × r matrix, so N costs O(m²r²) and the m⁴ traces are never needed.
    """
    pairs = (p[:, :, None] * p[:, None, :]).flatten(1)  # (layers, mm)
    inner = pairs[:, None] @ other.flatten(1, 2).flatten(2)  # (layers, 1, rr)
    return (own.flatten(1, 2).flatten(2) @ inner.mT).view(own.shape[:3])


def nearest_average(
    B: Float[Tensor, "layers m d_out r"],
    A: Float[Tensor, "layers m r d_in"],
    weights: Float[Tensor, "m"],
    *,
    sweeps: int = 100,
    tolerance: float = 1e-8,
) -> tuple[
    Float[Tensor, "layers d_out r"],
    Float[Tensor, "layers r d_in"],
    Float[Tensor, "layers m"],
    Float[Tensor, "layers m"],
]:
    """B̂ = Σq_uB_u, Â = Σp_vA_v, p and q at a local minimum of ‖M − B̂Â‖_F² (FLoRA-NA, arXiv:2509.26399).

    With p fixed the objective ‖M‖² − 2qᵀcp + qᵀNq is quadratic in q, and the other way round, where c[u,
    v] = ⟨M, B_uA_v⟩. Each half sweep is the proximal step (N + εI)δ = cp − Nq, q ← q + δ: never uphill,
    also where N is singular, and free of a ridge's bias. It starts at p = q = weights, so no layer ends
    above FedAvg; a layer stops at a relative decrease below `tolerance`. p and q are float64.

    Cost: `gram_blocks`, then O(m²r² + m³) a half sweep; a few sweeps as a rule.
    """
    GB, GA = gram_blocks(B, A)
    w = weights.double().expand(len(B), -1)
    # (layers, u, k a b) @ (layers, k a b, v)
    target = (GB.transpose(1, 2) * w[:, None, :, None, None]).flatten(2) @ GA.transpose(1, 2).flatten(2).mT
    energy = (w * target.diagonal(dim1=1, dim2=2)).sum(-1)  # ‖M‖²
    p, q, active = w, w, torch.ones(len(B), dtype=torch.bool)

    def objective(p: Tensor, q: Tensor) -> Tensor:
        N = normal_matrix(GA, GB, q)
        return energy + (p * ((N @ p[..., None] - 2 * target.mT @ q[..., None])[..., 0])).sum(-1)

    start = value = objective(p, q)
    floor = 1e-15 * energy  # below it a decrease is rounding
    for _ in range(sweeps):
        q = _proximal(normal_matrix(GB, GA, p), target, p, q, active)
        N = normal_matrix(GA, GB, q)
        p = _proximal(N, target.mT, q, p, active)
        before, value = value, objective(p, q)
        active = active & (before - value > tolerance * before + floor)
        if not active.any():
            break
    worse = (value > start)[:, None]
    p, q = torch.where(worse, w, p), torch.where(worse, w, q)
    return _combined(q, B), _combined(p, A), p, q


def _proximal(
    N: Float[Tensor, "layers m m"],
    target: Float[Tensor, "layers m m"],
    other: Float[Tensor, "layers m"],
    own: Float[Tensor, "layers m"],
    active: Tensor,
) -> Float[Tensor, "layers m"]:
    ridge = RIDGE * N.diagonal(dim1=1, dim2=2).mean(-1) + torch.finfo(N.dtype).tiny
    N_ridge = N + ridge[:, None, None] * torch.eye(N.shape[-1], dtype=N.dtype)
    gap = target @ other[..., None] - N @ own[..., None]
    step = torch.cholesky_solve(gap, torch.linalg.cholesky_ex(N_ridge).L)[..., 0]
    return own + step * active[:, None]


def _combined(q: Float[Tensor, "layers m"], X: Float[Tensor, "layers m a b"]) -> Float[Tensor, "layers a b"]:
    return (q.to(X.dtype)[:, None] @ X.flatten(2)).view(len(X), *X.shape[2:])


def procrustes_align(
    B_new: Float[Tensor, "layers d_out r"],
    A_new: Float[Tensor, "layers r d_in"],
    B_prev: Float[Tensor, "layers d_out r"],
    A_prev: Float[Tensor, "layers r d_in"],
) -> tuple[Float[Tensor, "layers d_out r"], Float[Tensor, "layers r d_in"]]:
    """(B_new R, RᵀA_new): BA in the basis nearest to the previous one; O((d_out + d_in) r² + r³).

    The orthogonal R minimising ‖B_new R − B_prev‖_F² + ‖RᵀA_new − A_prev‖_F² is UVᵀ of the SVD of
    B_newᵀB_prev + A_new A_prevᵀ.
    """
    agreement = B_new.double().mT @ B_prev.double() + A_new.double() @ A_prev.double().mT
    U, _, Vh = torch.linalg.svd(agreement)
    R = U @ Vh
    return (B_new.double() @ R).to(B_new.dtype), (R.mT @ A_new.double()).to(A_new.dtype)


def lora_fair_correction(
    B_mean: Float[Tensor, "layers d_out r"],
    A_mean: Float[Tensor, "layers r d_in"],
    B: Float[Tensor, "layers m d_out r"],
    A: Float[Tensor, "layers m r d_in"],
    weights: Float[Tensor, "m"],
    lam: float,
) -> Float[Tensor, "layers d_out r"]:
    """ΔB minimising 1 − cos(M, (B̄ + ΔB)Ā) + λ‖ΔB‖_F, the norm not squared (LoRA-FAIR, arXiv:2411.14961).

    Where the paper runs SGD, this searches the minimum along one number. Let X = B̄ + ΔB, S = ĀĀᵀ, G =
    MĀᵀ: the cosine is ⟨G, X⟩ / (‖M‖ ‖XS^½‖), so a stationary X is (B̄ + βG)(I + γS)⁻¹ with β, γ ≥ 0. As
    the cosine ignores X's length, ⟨X, X − B̄⟩ = 0, which makes β the positive root of a quadratic, given
    γ. In the eigenbasis of S all terms are sums over r known numbers. γ = 0 is FedAvg; γ → ∞ is the best
    cosine a fixed Ā allows, at the least ‖ΔB‖ (at λ = 0 the objective leaves the length open). ΔB = 0
    where nothing is better: λ large, or B̄ or M zero. Cost O((d_out + d_in)(mr)²), all of it for ‖M‖.
    """
    left, right = stacked(B.double(), A.double(), weights)
    B_bar, A_bar = B_mean.double(), A_mean.double()
    norm_M = product_norm(left, right)[:, None]
    s, V = torch.linalg.eigh(A_bar @ A_bar.mT)  # S = V diag(s) Vᵀ
    s = s.clamp(min=0)
    BV, GV = B_bar @ V, left @ (right @ A_bar.mT) @ V  # (layers, d_out, r)
    b, g, h = ((x * y).sum(1)[:, None] for x, y in ((BV, BV), (GV, GV), (BV, GV)))

    def curve(gamma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """β, the weights w = 1 / (1 + γs) and the objective at every γ (layers, points)."""
        gs = gamma[..., None] * s[:, None]  # (layers, points, r)
        w = 1 / (1 + gs)
        square, linear = (w**2 * g).sum(-1, keepdim=True), ((2 * w - 1) * w * h).sum(-1, keepdim=True)
        constant = -(gs * w**2 * b).sum(-1, keepdim=True)
        root = (linear**2 - 4 * square * constant).sqrt()
        # of the root's two forms the one that does not cancel; 0/0 only where G = 0, which β multiplies
        beta = torch.where(linear > 0, -2 * constant / (linear + root), (root - linear) / (2 * square))
        beta = beta.nan_to_num(0.0)  # (layers, points, 1)
        inner = ((h + beta * g) * w).sum(-1)
        length = (s[:, None] * w**2 * (b + 2 * beta * h + beta**2 * g)).sum(-1).clamp(min=0).sqrt() * norm_M
        cosine = torch.where(length > 0, inner / length, 0.0)
        distance = (w**2 * (gs**2 * b - 2 * beta * gs * h + beta**2 * g)).sum(-1).clamp(min=0).sqrt()
        return beta, w, 1 - cosine + lam * distance

    unit = 1 / s[:, -1:].clamp(min=torch.finfo(s.dtype).tiny)  # γ in units of 1 / the largest of s
    best, width = torch.full_like(unit, 3.0), 9.0  # log₁₀ γ from −6 to 12
    grid = torch.linspace(-1, 1, 129, dtype=s.dtype)
    for _ in range(5):  # to 1e-7 of a decade
        points = best + width * grid
        best = points.gather(1, curve(unit * 10**points)[2].argmin(1, keepdim=True))
        width /= 32
    beta, w, value = curve(unit * 10**best)
    correction = ((BV + beta * GV) * w) @ V.mT - B_bar
    better = value < curve(torch.zeros_like(unit))[2]
    return torch.where(better[..., None], correction, 0.0).to(B_mean.dtype)
