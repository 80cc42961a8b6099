"""The server's mathematics on sums of products M = Σ_k w_k B_kA_k, kept in factors.

No d_out × d_in matrix is built unless the stacked factors are themselves that wide.

Shapes: B (layers, m, d_out, r), A (layers, m, r, d_in), weights (m,): m clients, every layer of one shape
at once. A client of smaller rank is zero-padded to r, which changes no product; a scale s_k is folded
into B or the weights by the caller. Any float dtype goes in and comes out; in between all is float64, in
which a Gram matrix of float32 factors is exact to their precision, and which costs little beside the
copies.

Source: Golub & Van Loan, Matrix Computations, §5.2 (QR) and §6.4 (Procrustes).
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from fedtri.errors import FedtriError


def stacked(
    B: Float[Tensor, "layers m d_out r"], A: Float[Tensor, "layers m r d_in"], weights: Float[Tensor, "m"]
) -> tuple[Float[Tensor, "layers d_out m*r"], Float[Tensor, "layers m*r d_in"]]:
    """[w_1B_1 … w_mB_m] and [A_1; …; A_m], whose product is M exactly; the weight sits on one side only.

    The left stack is laid out column by column, as LAPACK wants it.
    """
    weighted = B * weights.to(B.dtype)[:, None, None]
    return weighted.mT.flatten(1, 2).mT, A.flatten(1, 2)


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
    balanced: bool = True,
) -> tuple[Float[Tensor, "layers d_out rank"], Float[Tensor, "layers rank d_in"]]:
    """B̂Â, the matrix of rank at most `rank` nearest to M (Eckart–Young), at the cost of `product_svd`.

    Balanced, each factor gets √σ, so that their gradients have one scale; otherwise B̂ gets σ, and the rows of Â are
    orthonormal. Columns of B̂ and rows of Â beyond M's own rank are exactly zero.
    """
    U, S, Vh = product_svd(B, A, weights, rank)
    rounding = S[..., :1] * max(B.shape[2], A.shape[3]) * torch.finfo(S.dtype).eps
    S = torch.where(rounding < S, S, 0.0)
    S = pad(S, (0, max(0, rank - S.shape[-1])))[..., None, :rank]  # (layers, 1, rank)
    left, right = (S.sqrt(), S.sqrt()) if balanced else (S, S.sign())
    return (U * left).to(B.dtype), (Vh * right.mT).to(A.dtype)


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


def procrustes(agreement: Float[Tensor, "*batch r r"], *, proper: bool = False) -> Float[Tensor, "*batch r r"]:
    """The orthogonal R that maximises tr(RᵀG): UVᵀ of the SVD of G. R = I where G is zero.

    With G = XᵀY it is argmin ‖XR − Y‖_F.

    Args:
        agreement: G.
        proper: Only rotations are allowed, no reflections: of all with det R = 1 the best one.
    """
    U, _, Vh = torch.linalg.svd(agreement)
    R = U @ Vh
    if proper:
        U = torch.cat([U[..., :-1], U[..., -1:] * torch.linalg.det(R).sign()[..., None, None]], -1)
        R = U @ Vh
    still = ~agreement.flatten(-2).any(-1)[..., None, None]
    return torch.where(still, torch.eye(R.shape[-1], dtype=R.dtype), R)


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
    R = procrustes(B_new.double().mT @ B_prev.double() + A_new.double() @ A_prev.double().mT)
    return (B_new.double() @ R).to(B_new.dtype), (R.mT @ A_new.double()).to(A_new.dtype)
