"""CE-LoRA: only the r x r core travels; client i gets back sum_j w_ij C_j. arXiv:2503.23869.

w_ij ∝ data similarity (optimal transport between sketches) + model similarity (CKA between cores), rows sum to 1.
With `mixing = "shrunk"` these weights are drawn to those of the plain mean, as far as they predict nothing.
"""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from fedtri.adapters.layout import Key, key_name, parse_key
from fedtri.aggregation import means
from fedtri.errors import FedtriError
from fedtri.messages import Reply
from fedtri.method import AdapterSpec, Method, Paper, Plan
from fedtri.similarity.cores import core_similarity
from fedtri.similarity.distances import data_similarity, extend_distances
from fedtri.similarity.mixing import predictive_share, row_stochastic, shrunk
from fedtri.state import ServerState, Similarity

CHOICES = {
    "reference": ("init", "raw", "cosine"),
    "similarity": ("both", "data", "model", "uniform"),
    "mixing": ("similar", "shrunk"),
}


PAPER = Paper(
    "CE-LoRA",
    "Communication-Efficient and Personalized Federated Foundation Model Fine-Tuning via Tri-Matrix Adaptation",
    2025,
    "https://arxiv.org/abs/2503.23869",
)


def ce_lora(
    *,
    reference: str = "init",
    frozen: bool = False,
    similarity: str = "both",
    mixing: str = "similar",
    temperature: float | None = None,
    top_k: int | None = None,
) -> Method:
    """Learns A, B, C and H; sends C, receives its own mixture of all cores seen so far; H stays home.

    reference: what CKA compares, C − C_initial ("init", tells clients apart) or C itself ("raw", the paper's letter);
    or "cosine", the cosine of C − C_initial, which tells a move from its opposite, as CKA does not.
    frozen: whether A and B stay as they start, the same everywhere, and C starts at 0. False, the paper: they learn at
    home.
    similarity: both, or an ablation.
    mixing: by similarity ("similar", the paper), or shrunk to the plain mean as far as similarity in one half of the
    layers does not predict the other half ("shrunk").
    temperature: softmax(similarity / temperature) in place of plain normalisation.
    top_k: mix only the k most similar clients, oneself among them.
    """
    for name, value in (("reference", reference), ("similarity", similarity), ("mixing", mixing)):
        if value not in CHOICES[name]:
            raise FedtriError(f"method_options.{name}: expected one of {', '.join(CHOICES[name])}, got {value!r}")
    if temperature is not None and not temperature > 0:
        raise FedtriError(f"method_options.temperature: expected a number above 0, got {temperature}")
    if top_k is not None and top_k < 1:
        raise FedtriError(f"method_options.top_k: expected at least 1, got {top_k}")
    plan = Plan.of(train="CH" if frozen else "ABCH", up="C", down="C")
    uses_data = similarity in ("both", "data")

    def parts_of(cores: Float[Tensor, "m layers r r"], data: Float[Tensor, "m m"] | None) -> dict[str, Tensor]:
        """The similarities that count: of the data, where that is asked for, and of these cores."""
        found = {} if data is None else {"data": data}
        if similarity in ("both", "model"):
            # in a frozen basis cores start at 0, so that C itself is what was learned
            origin = "raw" if frozen or reference == "raw" else "init"
            found["model"] = core_similarity(cores, reference=origin, signed=reference == "cosine")
        return found

    def weights_of(parts: Mapping[str, Tensor], m: int) -> Float[Tensor, "m m"]:
        total = sum(parts.values(), torch.zeros(m, m)) if parts else torch.ones(m, m)
        return row_stochastic(total, temperature=temperature, top_k=top_k)

    def aggregate(state: ServerState, replies: Sequence[Reply]) -> ServerState:
        sent = {reply.client: {key_name(k): v for k, v in reply.up.items() if k.factor == "C"} for reply in replies}
        seen = {**_seen(state), **sent}
        clients, names = sorted(seen), sorted(next(iter(sent.values())))
        cores, m = _stacked(seen, clients, names), len(clients)
        data, own = _data(state, clients, clients) if uses_data else None, {**state.own, "seen": seen}
        parts = parts_of(cores, data)
        weights = weights_of(parts, m)
        if mixing == "shrunk":
            halves = [(cores[:, start::2], cores[:, 1 - start :: 2]) for start in (0, 1)] if len(names) > 1 else []
            share = predictive_share([(weights_of(parts_of(a, data), m), b.flatten(1)) for a, b in halves])
            weights, own = shrunk(weights, share), {**own, "share": torch.tensor(share)}
        state = means.personalise(state, _mix(clients, names, cores, weights))
        return state.with_(own=own, similarity=Similarity(tuple(clients), {**parts, "weights": weights}))

    def welcome(state: ServerState) -> ServerState:
        """Compute newcomers' distances to all; one that joins later starts from the cores mixed by data alone."""
        known = state.own.get("distance", torch.zeros(0, 0, dtype=torch.float64))
        distance = extend_distances(known.numpy(), list(state.sketches.values()))
        state = state.with_(own={**state.own, "distance": torch.from_numpy(distance)})
        seen = _seen(state)
        newcomers, clients = sorted(set(state.sketches) - set(seen)), sorted(seen)
        if not newcomers or not seen:
            return state
        names = sorted(seen[clients[0]])
        weights = _data(state, newcomers, clients)
        weights = weights / weights.sum(1, keepdim=True)
        if mixing == "shrunk":
            weights = shrunk(weights, float(state.own["share"]))
        return means.personalise(state, _mix(newcomers, names, _stacked(seen, clients, names), weights))

    return Method(
        "ce_lora",
        PAPER,
        lambda _: plan,
        aggregate,
        adapter=AdapterSpec(basis="orthonormal" if frozen else "kaiming", core=frozen),
        welcome=welcome if uses_data else None,
    )


def _seen(state: ServerState) -> Mapping[str, Mapping[str, Tensor]]:
    """The last cores of every client that ever replied, by client and tensor."""
    return state.own.get("seen", {})


def _stacked(
    seen: Mapping[str, Mapping[str, Tensor]], clients: Sequence[str], names: Sequence[str]
) -> Float[Tensor, "m layers r r"]:
    return torch.stack([torch.stack([seen[client][name] for name in names]) for client in clients])


def _data(state: ServerState, rows: Sequence[str], columns: Sequence[str]) -> Float[Tensor, "rows columns"]:
    """Data similarity between these clients, of whom the server has sketches."""
    place = {client: i for i, client in enumerate(state.sketches)}
    everyone = data_similarity(state.own["distance"].numpy())
    return everyone[[place[c] for c in rows]][:, [place[c] for c in columns]]


def _mix(
    clients: Sequence[str],
    names: Sequence[str],
    cores: Float[Tensor, "m layers r r"],
    weights: Float[Tensor, "n m"],
) -> dict[str, dict[Key, Tensor]]:
    """Σ_j w_ij C_j of each of these clients."""
    mixed = (weights.to(cores) @ cores.flatten(1)).unflatten(1, cores.shape[1:])  # (n, layers, r, r)
    keys = [parse_key(name) for name in names]
    return {client: dict(zip(keys, mixed[i], strict=True)) for i, client in enumerate(clients)}
