"""The in-process transport: every request and reply passes through the same bytes as on a network, and is counted."""

from collections.abc import Sequence

from fedtri.adapters.layout import Key
from fedtri.communication import codec
from fedtri.communication.feedback import rounded
from fedtri.federation.client import Site, client_update
from fedtri.messages import POOLED, Answer, Reply, Request
from fedtri.similarity import sketches


class LocalTransport:
    """All clients of a site, asked in one process."""

    def __init__(self, site: Site, dtype: str = "float32", features: int = 0) -> None:
        self.site, self.dtype, self.features = site, dtype, features

    def clients(self) -> list[str]:
        """The ids of the site's clients, sorted."""
        return sorted(client for client in self.site.splits if client != POOLED)

    def exchange(self, requests: Sequence[Request]) -> list[Answer]:
        """Encode each request, answer all of them, and decode each reply's bytes."""
        sent = [self.encode(request) for request in requests]
        received = self.serve([request.client for request in requests], sent)
        return [
            Answer(self.read(up, request.client), len(up), len(down))
            for request, down, up in zip(requests, sent, received, strict=True)
        ]

    def encode(self, request: Request) -> bytes:
        """A request's bytes."""
        message = codec.Message(request.phase, request.round, request.down)
        return codec.encode(message, self.site.executor.layout, self.dtype)

    def serve(self, clients: Sequence[str], sent: Sequence[bytes]) -> list[bytes]:
        """The clients' half: their replies' bytes to the bytes of requests of one phase."""
        layout, requests = self.site.executor.layout, []
        for client, data in zip(clients, sent, strict=True):
            message = codec.decode(data, layout, self._shapes(client))
            requests.append(Request(message.phase, message.round, client, message.factors))
        said = []
        for reply in client_update(self.site, requests) if requests else []:
            message = codec.Message(
                phase=requests[0].phase,
                round=reply.round,
                factors=rounded(self.site.store, reply, self.dtype).up,
                num_examples=reply.num_examples,
                metrics=reply.metrics,
                sketch=b"" if reply.sketch is None else sketches.encode(reply.sketch),
            )
            said.append(codec.encode(message, layout, self.dtype))
        return said

    def read(self, data: bytes, client: str) -> Reply:
        """A client's reply from its bytes."""
        message = codec.decode(data, self.site.executor.layout, self._shapes(client))
        found = None
        if message.sketch:
            found = sketches.decode(message.sketch, classes=self.site.label_count, d=self.features)
        return Reply(client, message.round, message.factors, message.num_examples, message.metrics, found)

    def _shapes(self, client: str) -> dict[Key, tuple[int, ...]]:
        return self.site.executor.layout.shapes(self.site.scales.ranks[client])
