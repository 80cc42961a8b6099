"""The one place between messages and bytes: requests and replies to buffers and back, with every check on what is read.

What is compressed, and how, stands in compression.py, and what a client remembers for it in memory.py. A buffer is
sealed: it is readable only with the configuration, run and client that it was written for.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch

from fedtri.adapters.layout import Factors
from fedtri.communication import framing, memory
from fedtri.communication.compression import FLOAT32, Traffic, Types, differences, rounded, values_of, with_feedback
from fedtri.communication.framing import Message, Shapes, Way
from fedtri.communication.memory import Memory
from fedtri.errors import FedtriError
from fedtri.federation.server import Expectation, refuse
from fedtri.messages import Held, Reply, Request
from fedtri.method import Plan
from fedtri.metrics import ONCE
from fedtri.similarity import sketches
from fedtri.storage.client_store import ClientStore

HALF = 65504.0
"""The largest number of float16."""
GRADIENT = frozenset("AB")
"""The factors that a client sends of its first gradient, where a basis is made of these."""


@dataclass(frozen=True)
class SketchSize:
    """How large a client's sketch of its data is: number of classes, and d of a feature."""

    classes: int = 1
    features: int = 0
    half: bool = False
    """Whether its numbers travel as float16."""


@dataclass(frozen=True)
class Codec:
    """What both ends of a run must agree on to read each other."""

    expected: Expectation
    """The layout, each client's rank, and the largest norm of a tensor."""
    plan: Callable[[int], Plan]
    """What travels in a round."""
    types: Types = FLOAT32
    """The number types of what is written."""
    sketch: SketchSize = SketchSize()
    start: Callable[[str], Factors] = field(default=lambda client: {}, repr=False)
    """What a client starts from, as far as both ends derive it from the run's seed."""
    bases: frozenset[str] = frozenset()
    """The factors of a basis that the clients' gradients give."""
    fingerprint: bytes = b""
    """A digest of all settings that both ends share."""
    run: bytes = field(default=b"", repr=False)
    """A number of this run alone."""

    def write_request(self, request: Request) -> bytes:
        """The server's request to one client. Raises FedtriError for a number that its type cannot hold."""
        message = self._asking(request)
        for key, value in message.factors.items():
            if message.ways[key].numbers == "float16" and bool((value.abs() > HALF).any()):
                raise FedtriError(
                    f"{request.client}: {key.factor} of {key.layer} holds {float(value.abs().amax()):.3g}, expected "
                    f"numbers up to {HALF:g}, which float16 can hold; set wire.down and wire.basis to bfloat16"
                )
        return self._write(message, request.client)

    def held(self, request: Request) -> Held | None:
        """What a client has of the server once it has answered this request; it remembers the same."""
        if not _changes(request):
            return request.base
        message = self._asking(request)
        read = {key: rounded(value, message.ways[key]) for key, value in message.factors.items()}
        return self._after(request, values_of(read, message.ways, self._has(request.client, request.base)))

    def open_request(self, data: bytes, client: str) -> Message:
        """The message in a buffer that this client was sent, differences as they are.

        Raises FedtriError where it is altered, too long, of another run, client or configuration, or where it holds a
        tensor that does not come down in that round.
        """
        phase, round = framing.phase_and_round(data)
        return self._read(data, client, frozenset[str]() if phase in ONCE else self.plan(round).down)

    def read_request(self, said: Message | bytes, client: str, store: ClientStore) -> Request:
        """The request in a buffer, or in a message that `open_request` has read from it.

        Args:
            said: The buffer or message.
            client: The client that was sent it.
            store: The client's files, as they were before this request.

        Raises:
            FedtriError: As `open_request` does, and for a tensor whose norm is too large.
            BehindError: Where the client no longer has what the request builds on.
        """
        said = self.open_request(said, client) if isinstance(said, bytes) else said
        if said.phase in ONCE:
            return Request(said.phase, said.round, client, {})
        base = memory.recall(store, client, said.base, follows=self.types.differ).held
        down = values_of(said.factors, said.ways, self._has(client, base))
        check_norms(down, self.expected.norm_bound)
        return Request(said.phase, said.round, client, down, None if said.base == framing.NOTHING else base)

    def write_reply(self, reply: Reply, request: Request, store: ClientStore) -> bytes:
        """A client's reply; `store` keeps what the client has to remember until its next message.

        Args:
            reply: What the client answers.
            request: What it was asked, as `read_request` gave it.
            store: The client's files.
        """
        phase, client = request.phase, reply.client
        sent = {key: value.detach().cpu() for key, value in reply.up.items()}
        if phase == "basis":
            ways = dict.fromkeys(sent, Way(self.types.basis))
        else:
            ways = self.traffic.ways(sent, self.types.up, ())
        if self.types.differ and _changes(request):
            after = self._after(request, request.down)
            has = self._has(client, after)
            ways = self.traffic.ways(sent, self.types.up, has)
            sent = differences(sent, ways, has)
            lost = memory.recall(store, client, memory.base_of(request.base), follows=True).lost
            fed, lost = with_feedback(self.traffic.follows(sent), lost, ways)
            sent = {**sent, **fed}
            tag = f"{reply.round + 1:05}-trained" if phase == "train" else f"{reply.round:05}-received"
            memory.remember(store, client, Memory(after, lost), tag)
        return self._write(
            Message(
                phase=phase,
                round=reply.round,
                factors=sent,
                num_examples=reply.num_examples,
                metrics=reply.metrics,
                sketch=b"" if reply.sketch is None else sketches.encode(reply.sketch, half=self.sketch.half),
                ways=ways,
            ),
            client,
        )

    def read_reply(self, data: bytes, request: Request) -> Reply:
        """The reply in a buffer, fit to be used.

        Raises FedtriError, naming no client, where it answers another request, or what it says cannot be used: see
        `open_request` and `federation.server.refuse`.
        """
        phase, client = request.phase, request.client
        up = self._up(request)
        size = self.sketch
        room = sketches.most_bytes(size.classes, size.features, half=size.half) if phase == "sketch" else 0
        expected = self.expected.of_gradients if phase == "basis" else self.expected
        said = replace(self, expected=expected)._read(data, client, up, room)
        if (said.round, said.phase) != (request.round, phase):
            raise FedtriError(
                f"wire: the reply is to {said.phase} of round {said.round + 1}, "
                f"expected {phase} of round {request.round + 1}"
            )
        found = None
        if phase == "sketch":
            found = sketches.decode(said.sketch, classes=size.classes, d=size.features, half=size.half)
        ours = {**request.values, **request.down}
        values = values_of(said.factors, said.ways, {**self._has(client, None), **self.traffic.follows(ours)})
        reply = Reply(client, said.round, values, said.num_examples, said.metrics, found)
        if phase in ("basis", "train") and (why := refuse(reply, up, expected)):
            raise FedtriError(why.removeprefix(f"{client}: "))
        return reply

    def for_run(self, run: bytes) -> "Codec":
        """The codec of one run."""
        return replace(self, run=run)

    @property
    def traffic(self) -> Traffic:
        """What travels, and in which types."""
        return Traffic.of(self.plan, self.types, self.bases)

    def _up(self, request: Request) -> frozenset[str]:
        """The factors that the reply to this request holds."""
        if request.phase == "basis":
            return GRADIENT
        return self.plan(request.round).up if request.phase == "train" else frozenset()

    def _asking(self, request: Request) -> Message:
        """What the server writes to a client."""
        has = self._has(request.client, request.base)
        ways = self.traffic.ways(request.down, self.types.down, has)
        sent = differences(request.down, ways, has)
        base = memory.base_of(request.base)
        return Message(request.phase, request.round, sent, ways=ways, base=base)

    def _has(self, client: str, held: Held | None) -> Factors:
        """What a client has of the tensors that both ends follow."""
        if not self.types.differ:
            return {}
        return {**self.traffic.follows(self.start(client)), **(held.factors if held is not None else {})}

    def _after(self, request: Request, down: Factors) -> Held:
        """What a client has once it has answered a request that changes it, where it was sent `down`."""
        before = request.base or Held()
        rounds = request.round + 1 if request.phase == "train" else before.rounds
        return Held({**before.factors, **self.traffic.follows(down)}, rounds)

    def _write(self, message: Message, client: str) -> bytes:
        return framing.encode(message, self.expected.layout, self._seal(client))

    def _read(self, data: bytes, client: str, kinds: frozenset[str], sketch: int = 0) -> Message:
        shapes: Shapes = self.expected.shapes(client, kinds)
        types = self.types
        limit = framing.most_bytes(shapes, {types.up, types.down, types.basis}, sketch)
        return framing.decode(data, self.expected.layout, shapes, self._seal(client), limit)

    def _seal(self, client: str) -> bytes:
        """The digest that binds a buffer to configuration, run and client."""
        return hashlib.blake2b(self.fingerprint + self.run + client.encode(), digest_size=8).digest()


def _changes(request: Request) -> bool:
    """Whether an answer changes what both ends know of each other."""
    return request.phase not in ONCE and (request.phase == "train" or bool(request.down))


def check_norms(factors: Factors, bound: float) -> None:
    """Raises FedtriError where a tensor has a norm that is not finite or above `bound`."""
    for key, value in factors.items():
        norm = float(torch.linalg.vector_norm(value.double()))
        if not norm <= bound:
            raise FedtriError(
                f"wire: {key.factor} of {key.layer} has norm {norm:.3g}, expected a finite one up to {bound:g}"
            )
