"""CE-LoRA: only the r x r core travels; client i gets back sum_j w_ij C_j. arXiv:2503.23869.

w_ij ∝ data similarity (optimal transport between sketches) + model similarity (CKA between cores), rows sum to 1.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from fedtri.adapters.layout import Key
from fedtri.aggregation import means
from fedtri.errors import FedtriError
from fedtri.messages import Reply
from fedtri.method import Method, Plan
from fedtri.similarity.distances import core_similarity, data_similarity, row_stochastic
from fedtri.state import ServerState

CHOICES = {
    "reference": ("init", "raw"),
    "basis": ("local", "shared"),
    "similarity": ("both", "data", "model", "uniform"),
}


def ce_lora(
    *,
    reference: str = "init",
    basis: str = "local",
    similarity: str = "both",
    temperature: float | None = None,
    top_k: int | None = None,
) -> Method:
    """Learns A, B, C and H; sends C, receives its own mixture of all cores seen so far; H stays home.

    reference: what CKA compares, C − C_initial ("init", tells clients apart) or C itself ("raw", the paper's letter).
    basis: A and B learn at home ("local", the paper), or stay frozen, orthonormal and equal everywhere ("shared").
    similarity: both, or an ablation. temperature: softmax(similarity / temperature) in place of plain normalisation.
    top_k: mix only the k most similar clients, oneself among them.
    """
    for name, value in (("reference", reference), ("basis", basis), ("similarity", similarity)):
        if value not in CHOICES[name]:
            raise FedtriError(f"method_options.{name}: expected one of {', '.join(CHOICES[name])}, got {value!r}")
    if temperature is not None and not temperature > 0:
        raise FedtriError(f"method_options.temperature: expected a number above 0, got {temperature}")
    if top_k is not None and top_k < 1:
        raise FedtriError(f"method_options.top_k: expected at least 1, got {top_k}")
    shared = basis == "shared"
    plan = Plan.of(train="CH" if shared else "ABCH", up="C", down="C")
    uses_data = similarity in ("both", "data")

    def aggregate(state: ServerState, replies: Sequence[Reply]) -> ServerState:
        seen = {
            **state.seen,
            **{reply.client: {k: v for k, v in reply.up.items() if k.factor == "C"} for reply in replies},
        }
        clients, keys = sorted(seen), sorted(k for k in replies[0].up if k.factor == "C")
        cores = torch.stack([torch.stack([seen[c][k] for k in keys]) for c in clients])  # (m, layers, r, r)
        parts: dict[str, Float[Tensor, "m m"]] = {}
        if uses_data:
            parts["data"] = _data(state, clients, clients)
        if similarity in ("both", "model"):
            # in the shared basis cores start at 0, so that C itself is what was learned
            parts["model"] = core_similarity(cores, reference="raw" if shared or reference == "raw" else "init")
        total = torch.ones(len(clients), len(clients)) if similarity == "uniform" else sum(parts.values())
        assert isinstance(total, Tensor)
        weights = row_stochastic(total, temperature=temperature, top_k=top_k)
        state = means.personalise(state.with_(seen=seen), _mix(clients, keys, cores, weights))
        return state.with_(similarity={**parts, "weights": weights})

    def welcome(state: ServerState) -> ServerState:
        """A newcomer that has sent only its sketch starts from the cores mixed by data similarity alone."""
        newcomers, seen = sorted(set(state.sketches) - set(state.seen)), sorted(state.seen)
        if not newcomers or not seen:
            return state
        keys = sorted(state.seen[seen[0]])
        cores = torch.stack([torch.stack([state.seen[c][k] for k in keys]) for c in seen])
        weights = _data(state, newcomers, seen)
        weights = weights / weights.sum(1, keepdim=True)
        return means.personalise(state, _mix(newcomers, keys, cores, weights))

    return Method(
        "ce_lora",
        "arXiv:2503.23869",
        lambda _: plan,
        aggregate,
        needs_sketch=uses_data,
        welcome=welcome if uses_data else lambda state: state,
        basis="orthonormal" if shared else "kaiming",
    )


def _data(state: ServerState, rows: Sequence[str], columns: Sequence[str]) -> Float[Tensor, "rows columns"]:
    place = {client: i for i, client in enumerate(state.sketches)}
    everyone = data_similarity(state.data_distance)
    return everyone[[place[c] for c in rows]][:, [place[c] for c in columns]]


def _mix(
    clients: Sequence[str],
    keys: Sequence[Key],
    cores: Float[Tensor, "m layers r r"],
    weights: Float[Tensor, "n m"],
) -> dict[str, dict[Key, Tensor]]:
    mixed = (weights.to(cores) @ cores.flatten(1)).unflatten(1, cores.shape[1:])  # (n, layers, r, r)
    return {client: dict(zip(keys, mixed[i], strict=True)) for i, client in enumerate(clients)}
