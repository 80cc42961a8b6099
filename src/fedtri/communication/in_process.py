"""All clients in this process: every request and reply still passes through the bytes of a network, and is counted."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from fedtri.communication.codec import Codec
from fedtri.errors import FedtriError
from fedtri.federation.client import Site, client_update
from fedtri.messages import Answer, Failure, Request

LOG = logging.getLogger("fedtri")


@dataclass(frozen=True)
class LocalTransport:
    """All clients of a site, asked in one process."""

    site: Site
    codec: Codec

    def clients(self) -> list[str]:
        """The ids of the site's clients, sorted."""
        return self.site.clients

    def exchange(self, requests: Sequence[Request]) -> list[Answer | Failure]:
        """Encode each request, let the clients answer all of them, and decode each reply's bytes."""
        down = [self.codec.write_request(request) for request in requests]
        up = self.serve([request.client for request in requests], down)
        return [self.read(*one) for one in zip(requests, down, up, strict=True)]

    def serve(self, clients: Sequence[str], sent: Sequence[bytes]) -> list[bytes]:
        """The clients' half: the bytes of their replies to the bytes of requests, which are of one phase and round."""
        store = self.site.store
        requests = [self.codec.read_request(data, client, store) for client, data in zip(clients, sent, strict=True)]
        replies = client_update(self.site, requests) if requests else []
        return [self.codec.write_reply(reply, request, store) for reply, request in zip(replies, requests, strict=True)]

    def read(self, request: Request, down: bytes, up: bytes) -> Answer | Failure:
        """The server's half: what it makes of a reply's bytes."""
        try:
            return Answer(self.codec.read_reply(up, request), len(up), len(down), held=self.codec.held(request))
        except FedtriError as error:
            LOG.warning("%s: refused: %s", request.client, error)
            return Failure(request.client, f"{request.client}: {error}", refused=True)
