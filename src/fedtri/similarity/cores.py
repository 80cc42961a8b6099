"""How alike clients' cores are, by linear CKA (Kornblith et al. 2019, arXiv:1905.00414) or by the cosine.

CKA:     model_ij = mean over layers of <G_i, G_j> / (‖G_i‖ ‖G_j‖), G = CᵀC
cosine:  model_ij = max(0, mean over layers of <C_i, C_j> / (‖C_i‖ ‖C_j‖))
"""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize


def core_gram(cores: Float[Tensor, "m layers r r"]) -> Float[Tensor, "layers m rr"]:
    """C_kᵀC_k of each client and layer as unit rows: inner products are linear CKA under isotropic probes.

    With probes X ~ N(0, I) and representations Y_i = X C_iᵀ, linear CKA ‖Y_jᵀY_i‖²_F / (‖Y_iᵀY_i‖_F
    ‖Y_jᵀY_j‖_F) tends to <C_iᵀC_i, C_jᵀC_j> / (‖C_iᵀC_i‖_F ‖C_jᵀC_j‖_F) as probes grow many. A core of zeros
    gives a row of zeros. Source: Kornblith et al. 2019, arXiv:1905.00414.
    """
    return directions(cores.mT @ cores)


def directions(cores: Float[Tensor, "m layers r r"]) -> Float[Tensor, "layers m rr"]:
    """Each client's core of each layer as a unit row: inner products are cosines. A core of zeros gives zeros."""
    return normalize(cores.flatten(2).transpose(0, 1), dim=-1, eps=torch.finfo(cores.dtype).tiny)


def core_similarity(
    cores: Float[Tensor, "m layers r r"], *, reference: Literal["raw", "init"], signed: bool = False
) -> Float[Tensor, "m m"]:
    """Similarity between the clients' cores, averaged over layers, in [0, 1] with 1 on the diagonal.

    Linear CKA does not see signs: clients that moved in opposite directions have similarity 1. The cosine does
    (`signed`): these have 0, as have all that point away from each other.

    "raw" compares C, as the paper does; "init" compares C − I, what was learned: a core that has not moved
    says nothing, and its similarity to every other client is 0. Nor has one moved that a mixture of cores at I has left
    within rounding of I: two of these would be alike in their noise. Source: CE-LoRA, arXiv:2503.23869.
    """
    m, layers, r, _ = cores.shape
    moved = cores
    if reference == "init":
        moved = cores - torch.eye(r, dtype=cores.dtype, device=cores.device)
        still = torch.linalg.matrix_norm(moved, keepdim=True) <= 64 * torch.finfo(cores.dtype).eps * r**0.5
        moved = moved.masked_fill(still, 0)
    similarity = cores.new_zeros(m, m)
    for rows in directions(moved) if signed else core_gram(moved):
        similarity.addmm_(rows, rows.T, alpha=1 / layers)  # in place: m × m is all that grows with m²
    return similarity.clamp_(0, 1).fill_diagonal_(1)
