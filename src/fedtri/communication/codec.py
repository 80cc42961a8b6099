"""The one place between messages and bytes: requests and replies to buffers and back, with every check on what is read.

A reply is compressed with error feedback where its number type rounds: what is lost stays in the client's own store.
A buffer is sealed: it is readable only with the configuration, run and client that it was written for.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch

from fedtri.adapters.layout import Factors
from fedtri.communication import framing
from fedtri.communication.framing import Message, Shapes
from fedtri.communication.numbers import NUMBERS, with_feedback
from fedtri.errors import FedtriError
from fedtri.federation.server import Expectation, refuse
from fedtri.messages import Reply, Request
from fedtri.method import Plan
from fedtri.metrics import Phase
from fedtri.similarity import sketches
from fedtri.storage.client_store import ClientStore, beside

LOST = "lost"
"""Beside a client's own tensors: what rounding its replies has lost so far."""
GRADIENT = frozenset("AB")
"""The factors that a client sends of its first gradient, where a basis is made of these."""


@dataclass(frozen=True)
class SketchSize:
    """How large a client's sketch of its data is: number of classes, and d of a feature."""

    classes: int = 1
    features: int = 0


@dataclass(frozen=True)
class Codec:
    """What both ends of a run must agree on to read each other."""

    expected: Expectation
    """The layout, each client's rank, and the largest norm of a tensor."""
    plan: Callable[[int], Plan]
    """What travels in a round."""
    dtype: str = "float32"
    """The number type of what is written, one of NUMBERS."""
    sketch: SketchSize = SketchSize()
    fingerprint: bytes = b""
    """A digest of all settings that both ends share."""
    run: bytes = field(default=b"", repr=False)
    """A number of this run alone."""

    def write_request(self, request: Request) -> bytes:
        """The server's request to one client."""
        return self._write(Message(request.phase, request.round, request.down), request.client)

    def read_request(self, data: bytes, client: str) -> Request:
        """The request in a buffer that this client was sent.

        Raises FedtriError where it is altered, too long, of another run, client or configuration, or where it holds a
        tensor that does not come down in that round or whose norm is too large.
        """
        phase, round = framing.phase_and_round(data)
        kinds = frozenset[str]() if phase in ("basis", "sketch") else self.plan(round).down
        said = self._read(data, client, kinds)
        check_norms(said.factors, self.expected.norm_bound)
        return Request(said.phase, said.round, client, said.factors)

    def write_reply(self, reply: Reply, phase: Phase, store: ClientStore) -> bytes:
        """A client's reply; `store` keeps what rounding loses until the client's next reply."""
        return self._write(
            Message(
                phase=phase,
                round=reply.round,
                factors=self._compressed(reply, store) if phase == "train" else reply.up,
                num_examples=reply.num_examples,
                metrics=reply.metrics,
                sketch=b"" if reply.sketch is None else sketches.encode(reply.sketch),
            ),
            reply.client,
        )

    def read_reply(self, data: bytes, request: Request) -> Reply:
        """The reply in a buffer, fit to be used.

        Raises FedtriError, naming no client, where it answers another request, or what it says cannot be used: see
        `read_request` and `federation.server.refuse`.
        """
        phase, client = request.phase, request.client
        up = self._up(request)
        room = sketches.most_bytes(self.sketch.classes, self.sketch.features) if phase == "sketch" else 0
        expected = self.expected.of_gradients if phase == "basis" else self.expected
        said = replace(self, expected=expected)._read(data, client, up, room)
        if (said.round, said.phase) != (request.round, phase):
            raise FedtriError(
                f"wire: the reply is to {said.phase} of round {said.round + 1}, "
                f"expected {phase} of round {request.round + 1}"
            )
        found = None
        if phase == "sketch":
            found = sketches.decode(said.sketch, classes=self.sketch.classes, d=self.sketch.features)
        reply = Reply(client, said.round, said.factors, said.num_examples, said.metrics, found)
        if phase in ("basis", "train") and (why := refuse(reply, up, expected)):
            raise FedtriError(why.removeprefix(f"{client}: "))
        return reply

    def for_run(self, run: bytes) -> "Codec":
        """The codec of one run."""
        return replace(self, run=run)

    def _up(self, request: Request) -> frozenset[str]:
        """The factors that the reply to this request holds."""
        if request.phase == "basis":
            return GRADIENT
        return self.plan(request.round).up if request.phase == "train" else frozenset()

    def _compressed(self, reply: Reply, store: ClientStore) -> Factors:
        numbers, name = NUMBERS[self.dtype], beside(reply.client, LOST)
        if not (numbers.feedback and reply.up):
            return reply.up
        before = store.load(name) or {}
        sent, lost = with_feedback(reply.up, before, numbers)
        store.save(name, lost, f"{reply.round + 1:05}-trained")
        return sent

    def _write(self, message: Message, client: str) -> bytes:
        return framing.encode(message, self.expected.layout, self.dtype, self._seal(client))

    def _read(self, data: bytes, client: str, kinds: frozenset[str], sketch: int = 0) -> Message:
        shapes: Shapes = self.expected.shapes(client, kinds)
        limit = framing.most_bytes(shapes, self.dtype, sketch)
        return framing.decode(data, self.expected.layout, shapes, self._seal(client), limit)

    def _seal(self, client: str) -> bytes:
        """The digest that binds a buffer to configuration, run and client."""
        return hashlib.blake2b(self.fingerprint + self.run + client.encode(), digest_size=8).digest()


def check_norms(factors: Factors, bound: float) -> None:
    """Raises FedtriError where a tensor has a norm that is not finite or above `bound`."""
    for key, value in factors.items():
        norm = float(torch.linalg.vector_norm(value.double()))
        if not norm <= bound:
            raise FedtriError(
                f"wire: {key.factor} of {key.layer} has norm {norm:.3g}, expected a finite one up to {bound:g}"
            )
