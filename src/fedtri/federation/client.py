"""The clients' half of a round: receive, train, score, and split the result into what leaves home and what stays."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module

import numpy as np
from torch import Tensor

from fedtri.adapters.layout import Factors, Key, only
from fedtri.data.partition import Split
from fedtri.execution.executor import (
    ClientModel,
    Executor,
    HeadInputs,
    OnStep,
    Optimization,
    Rows,
    Scoring,
    Training,
)
from fedtri.execution.workers import Worker, side_by_side
from fedtri.federation import head_start
from fedtri.federation.basis import drawn, leading_factors
from fedtri.messages import POOLED, Reply, Request, Sketch
from fedtri.method import Method, Plan, Trained
from fedtri.seeds import derive
from fedtri.similarity import sketches
from fedtri.state import Scales
from fedtri.storage.client_store import ClientStore, beside

HEAD_START = "head-start"
"""The name under which a client keeps the layer that was fitted for it, and from which its folds are drawn."""


@dataclass(frozen=True)
class Site:
    """All that the client side of a federation holds: one real client, or many simulated ones on one backbone."""

    executor: Executor
    method: Method
    splits: Mapping[str, Split]
    scales: Scales
    optimization: Optimization
    initial: Callable[[str], Factors]
    """What a client starts from, derived from the run's seed."""
    fresh: Callable[[str, int], Factors]
    """A new draw of a client's A, C and B for a round."""
    store: ClientStore
    seed: int
    labels: Rows | None = None
    """The class of each example, for sketches; None where there are none."""
    label_count: int = 1
    """How many classes a sketch has."""
    sketch_dims: int = 0
    """On how many random directions features are projected for a sketch; 0: none are."""
    classes: Mapping[str, np.ndarray] = field(default_factory=dict)
    """The classes of each client's own head, where these differ; empty where all have all."""
    basis_examples: int = 64
    """From how many of its training examples a client computes its gradient for a basis, at most."""
    gradient_factors: int = 4
    """How many leading factors of it a client sends, at most its rank."""
    evaluate: bool = True
    """Whether clients are scored after local training too; where they are asked to evaluate, they do."""
    validate: bool = False
    """Whether the validation split is scored too (early stopping needs it)."""
    fits_heads: bool = False
    """Whether a client's head starts as its own examples fit it (`head_start.py`), not as the model has it."""
    on_step: OnStep = lambda client, step, loss: None

    @property
    def clients(self) -> list[str]:
        """The clients' names, sorted, without the pseudo-client."""
        return sorted(client for client in self.splits if client != POOLED)

    def model(self, client: str, factors: Factors) -> ClientModel:
        """A client's model with these tensors."""
        rank = self.scales.ranks[client]
        return ClientModel(client, factors, rank, self.scales.alpha, self.classes.get(client))

    def kept(self, client: str) -> Factors:
        """The client's own tensors as it last kept them."""
        return self.store.load(client) or self.initial(client)


def client_update(site: Site, requests: Sequence[Request]) -> list[Reply]:
    """Answer the requests of one phase of one round, one a client, in their order."""
    answer = {"basis": _basis, "sketch": _sketch, "train": _train, "evaluate": _evaluate}[requests[0].phase]
    return answer(site, requests)


def received(site: Site, request: Request) -> Factors:
    """The client's own tensors with what came down in them, as the method has it."""
    own = site.kept(request.client)
    return site.method.receive(own, request.down, partial(site.fresh, request.client, request.round))


@dataclass(frozen=True)
class Home:
    """The `LocalRound` of a site's clients; see `fedtri.method`."""

    site: Site
    round: int
    plan: Plan
    clients: Sequence[str]
    received: Sequence[Factors]

    def train(
        self,
        start: Sequence[Factors],
        *,
        learns: frozenset[str] | None = None,
        proximal: float = 0.0,
        towards: Sequence[Factors] | None = None,
        purpose: str = "",
    ) -> list[Trained]:
        """See `LocalRound`."""
        site = self.site
        work = [
            Training(
                site.model(client, factors), site.splits[client].train, self._seed(client, purpose), proximal,
                None if towards is None else towards[place],
            )
            for place, (client, factors) in enumerate(zip(self.clients, start, strict=True))
        ]  # fmt: skip
        return site.executor.train(work, self.plan.train if learns is None else learns, site.optimization, site.on_step)

    def evaluate(self, factors: Sequence[Factors]) -> list[dict[str, float]]:
        """See `LocalRound`."""
        if not self.site.evaluate:
            return [{} for _ in self.clients]  # what comes of the last round is scored all the same
        return _scores(self.site, self.clients, factors)

    def memory(self, name: str) -> list[Factors | None]:
        """See `LocalRound`."""
        return [self.site.store.load(beside(client, name)) for client in self.clients]

    def remember(self, name: str, factors: Sequence[Factors]) -> None:
        """See `LocalRound`."""
        for client, own in zip(self.clients, factors, strict=True):
            self.site.store.save(beside(client, name), own, _trained(self.round))

    def _seed(self, client: str, purpose: str) -> int:
        seed = derive(self.site.seed, "batches", self.round, client)
        return derive(seed, purpose) if purpose else seed


def _trained(round: int) -> str:
    return f"{round + 1:05}-trained"


def _train(site: Site, requests: Sequence[Request]) -> list[Reply]:
    round, clients = requests[0].round, [request.client for request in requests]
    plan = site.method.plan(round)
    start = [received(site, request) for request in requests]
    if site.fits_heads:
        start = _with_fitted_heads(site, round, clients, start)
    home = Home(site, round, plan, clients, start)
    replies = []
    for request, update in zip(requests, site.method.local_update(home), strict=True):
        site.store.save(request.client, update.kept, _trained(round))
        sent = update.kept if update.sent is None else update.sent
        replies.append(_reply(site, request, only(sent, plan.up), update.metrics))
    return replies


def _with_fitted_heads(
    site: Site, round: int, clients: Sequence[str], start: Sequence[Factors]
) -> list[dict[Key, Tensor]]:
    """What clients start a round from, with the head of each that trains for the first time fitted to its examples.

    The fitted layer is kept beside the client's own tensors: that says which clients have had theirs.
    """
    found = [dict(own) for own in start]
    new = [place for place, client in enumerate(clients) if site.store.load(beside(client, HEAD_START)) is None]
    if not new:
        return found
    work = [Scoring(site.model(clients[place], found[place]), site.splits[clients[place]].train) for place in new]
    inputs = site.executor.head_inputs(work)
    import_module("sklearn.linear_model")  # once, not in each of the processes that fork off

    def fit(place: int, seen: HeadInputs, _: Worker) -> dict[Key, Tensor]:
        client = clients[place]
        seed = derive(site.seed, HEAD_START, client) % 2**32
        return head_start.fitted(site.executor.layout, found[place], seen, site.classes.get(client), seed)

    layers = side_by_side([partial(fit, place, seen) for place, seen in zip(new, inputs, strict=True)])
    for place, layer in zip(new, layers, strict=True):
        found[place] |= layer
        site.store.save(beside(clients[place], HEAD_START), layer, _trained(round))
    return found


def _evaluate(site: Site, requests: Sequence[Request]) -> list[Reply]:
    held = [received(site, request) for request in requests]
    for request, own in zip(requests, held, strict=True):
        if request.down:
            site.store.save(request.client, own, f"{request.round:05}-received")
    scores = _scores(site, [request.client for request in requests], held)
    return [_reply(site, request, {}, own) for request, own in zip(requests, scores, strict=True)]


def _scores(site: Site, clients: Sequence[str], factors: Sequence[Factors]) -> list[dict[str, float]]:
    """Each client's metrics on its test split, and its loss on its validation split where that is asked for."""
    models = [site.model(client, own) for client, own in zip(clients, factors, strict=True)]
    found: list[dict[str, float]] = [{} for _ in clients]
    for place, scores in _scored(site, models, [site.splits[client].test for client in clients], further=True):
        found[place] |= scores
    if site.validate:
        rows = [site.splits[client].validation for client in clients]
        for place, scores in _scored(site, models, rows, further=False):
            found[place]["validation_loss"] = scores["loss"]
    return found


def _scored(
    site: Site, models: Sequence[ClientModel], rows: Sequence[Rows], *, further: bool
) -> list[tuple[int, dict[str, float]]]:
    """(place, scores) of each client that has such examples."""
    places = [place for place, own in enumerate(rows) if len(own)]
    work = [Scoring(models[place], rows[place], further) for place in places]
    return list(zip(places, site.executor.evaluate(work) if work else [], strict=True))


def _basis(site: Site, requests: Sequence[Request]) -> list[Reply]:
    """Each client's gradient where everyone starts: ΔW = 0, and the head as it is before any training."""
    models, rows, reduce = [], [], []
    for client in (request.client for request in requests):
        rows.append(drawn(site.splits[client].train, site.basis_examples, site.seed, client))
        models.append(site.model(client, site.initial(client)))
        count = min(site.gradient_factors, site.scales.ranks[client])
        reduce.append(leading_factors(count, site.seed, client))
    found = site.executor.gradients(models, rows, reduce)
    return [_reply(site, request, up) for request, up in zip(requests, found, strict=True)]


def _sketch(site: Site, requests: Sequence[Request]) -> list[Reply]:
    rows = [site.splits[request.client].train for request in requests]
    features = site.executor.features(rows)
    import_module("sklearn.mixture")  # once, not in each of the processes that fork off

    def fit(place: int, _: Worker) -> Sketch:
        return sketches.fit(
            sketches.projected(features[place], site.sketch_dims, site.seed),
            None if site.labels is None else site.labels[rows[place]],
            classes=site.label_count,
            seed=derive(site.seed, "sketch", requests[place].client) % 2**32,
        )

    found = side_by_side([partial(fit, place) for place in range(len(requests))])
    return [_reply(site, request, {}, sketch=own) for request, own in zip(requests, found, strict=True)]


def _reply(
    site: Site, request: Request, up: Factors, metrics: Mapping[str, float] | None = None, sketch: Sketch | None = None
) -> Reply:
    examples = len(site.splits[request.client].train)
    return Reply(request.client, request.round, up, examples, metrics or {}, sketch)
