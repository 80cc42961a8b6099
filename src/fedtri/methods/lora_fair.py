"""LoRA-FAIR: the means of A and B, B corrected so that their product points where the mean product does.

ΔB minimises 1 − cos(Σ p_k B_kA_k, (B̄ + ΔB)Ā) + λ‖ΔB‖_F; clients get back Ā and B̄ + ΔB. arXiv:2411.14961.
"""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from scipy.optimize import elementwise
from torch import Tensor

from fedtri.aggregation import means, pairs, products
from fedtri.errors import FedtriError
from fedtri.messages import Reply
from fedtri.method import Method, Paper, Plan
from fedtri.state import ServerState

PAPER = Paper(
    "LoRA-FAIR",
    "LoRA-FAIR: Federated LoRA Fine-Tuning with Aggregation and Initialization Refinement",
    2024,
    "https://arxiv.org/abs/2411.14961",
)


def lora_fair(*, lam: float = 0.01) -> Method:
    """Learns, sends and receives A, B and H.

    lam: keeps the correction small; 0 or more.
    """
    if lam < 0:
        raise FedtriError(f"method_options.lam: expected 0 or more, got {lam}")
    plan = Plan.of(train="ABH", up="ABH", down="ABH")

    def aggregate(state: ServerState, replies: Sequence[Reply]) -> ServerState:
        weights = means.example_weights(replies)

        def solve(group: pairs.Pairs) -> pairs.Pair:
            B, A = means.mean_of(group.B, weights), means.mean_of(group.A, weights)
            return B + correction(B, A, group.B, group.A, weights, lam), A

        return pairs.share_pairs(state, replies, solve)

    return Method("lora_fair", PAPER, lambda _: plan, aggregate)


DECADES = np.linspace(-6, 12, 73)
"""log₁₀ γ, in units of 1 / the largest eigenvalue of ĀĀᵀ: where the minimum is looked for before it is refined."""


def correction(
    B_mean: Float[Tensor, "layers d_out r"],
    A_mean: Float[Tensor, "layers r d_in"],
    B: Float[Tensor, "layers m d_out r"],
    A: Float[Tensor, "layers m r d_in"],
    weights: Float[Tensor, "m"],
    lam: float,
) -> Float[Tensor, "layers d_out r"]:
    """ΔB minimising 1 − cos(M, (B̄ + ΔB)Ā) + λ‖ΔB‖_F, the norm not squared, with M = Σ p_k B_kA_k.

    Where the paper runs SGD, this looks for one number. Let X = B̄ + ΔB, S = ĀĀᵀ, G = MĀᵀ: the cosine is
    ⟨G, X⟩ / (‖M‖ ‖XS^½‖), so a stationary X is (B̄ + βG)(I + γS)⁻¹ with β, γ ≥ 0. As the cosine ignores X's length,
    ⟨X, X − B̄⟩ = 0, which makes β the positive root of a quadratic, given γ. In the eigenbasis of S all terms are sums
    over r known numbers. γ = 0 is FedAvg; γ → ∞ is the best cosine that a fixed Ā allows, at the least ‖ΔB‖ (at λ = 0
    the objective leaves the length open). ΔB = 0 where nothing is better: λ large, or B̄ or M zero.
    Cost O((d_out + d_in)(mr)²), all of it for ‖M‖; γ is found to 1e-7 of a decade.
    """
    left, right = products.stacked(B.double(), A.double(), weights)
    B_bar, A_bar = B_mean.double(), A_mean.double()
    s, V = torch.linalg.eigh(A_bar @ A_bar.mT)  # S = V diag(s) Vᵀ
    BV, GV = B_bar @ V, left @ (right @ A_bar.mT) @ V  # (layers, d_out, r)
    b, g, h = ((x * y).sum(1).numpy() for x, y in ((BV, BV), (GV, GV), (BV, GV)))
    s, norm_M = s.clamp(min=0).numpy(), products.product_norm(left, right).numpy()
    unit = 1 / np.where(s[:, -1] > 0, s[:, -1], 1.0)

    def curve(gamma: np.ndarray, layer: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """β, the weights w = 1 / (1 + γs) and the objective, at one γ of one layer in each place."""
        gs = gamma[..., None] * s[layer]  # (..., r)
        w = 1 / (1 + gs)
        square, linear = (w**2 * g[layer]).sum(-1), ((2 * w - 1) * w * h[layer]).sum(-1)
        constant = -(gs * w**2 * b[layer]).sum(-1)
        root = np.sqrt(linear**2 - 4 * square * constant)
        with np.errstate(divide="ignore", invalid="ignore"):
            # of the root's two forms the one that does not cancel; 0/0 only where G = 0, which β multiplies
            beta = np.where(linear > 0, -2 * constant / (linear + root), (root - linear) / (2 * square))
        beta = np.nan_to_num(beta, posinf=0.0)[..., None]
        inner = ((h[layer] + beta * g[layer]) * w).sum(-1)
        square_length = (s[layer] * w**2 * (b[layer] + 2 * beta * h[layer] + beta**2 * g[layer])).sum(-1)
        length = np.sqrt(square_length.clip(min=0)) * norm_M[layer]
        cosine = np.divide(inner, length, out=np.zeros_like(inner), where=length > 0)
        distance = (w**2 * (gs**2 * b[layer] - 2 * beta * gs * h[layer] + beta**2 * g[layer])).sum(-1)
        return beta, w, 1 - cosine + lam * np.sqrt(distance.clip(min=0))

    def objective(decade: np.ndarray, layer: np.ndarray) -> np.ndarray:
        return curve(unit[layer] * 10**decade, layer)[2]

    layers = np.arange(len(s))
    lowest = objective(DECADES, layers[:, None]).argmin(1)
    inside = lowest.clip(1, len(DECADES) - 2)
    found = elementwise.find_minimum(
        objective, (DECADES[inside - 1], DECADES[inside], DECADES[inside + 1]), args=(layers,),
        tolerances={"xatol": 1e-7, "xrtol": 0, "fatol": 0, "frtol": 0},
    )  # fmt: skip
    # at the end of the range, or where all is flat, there is nothing to refine
    decade = np.where(found.status == 0, found.x, DECADES[lowest])
    beta, w, value = curve(unit * 10**decade, layers)
    better = value < curve(np.zeros_like(unit), layers)[2]
    moved = ((BV + torch.from_numpy(beta)[:, None] * GV) * torch.from_numpy(w)[:, None]) @ V.mT - B_bar
    return torch.where(torch.from_numpy(better)[:, None, None], moved, 0.0).to(B_mean.dtype)
