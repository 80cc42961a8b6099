"""What both ends of a network run agree on to read each other's buffers, and the checks that each of them makes."""

import hashlib
from dataclasses import dataclass

from fedtri.adapters.layout import Layout
from fedtri.communication import codec


@dataclass(frozen=True)
class Terms:
    """What both ends of a run must agree on to read each other."""

    layout: Layout
    dtype: str
    norm_bound: float
    fingerprint: bytes
    run: bytes

    def seal(self, client: str) -> bytes:
        """The digest that binds a buffer to configuration, run and client."""
        return hashlib.blake2b(self.fingerprint + self.run + client.encode(), digest_size=8).digest()

    def encode(self, message: codec.Message, client: str) -> bytes:
        """The message as one buffer to or from this client."""
        return codec.encode(message, self.layout, self.dtype, self.seal(client))

    def decode(self, data: bytes, client: str, rank: int, kinds: frozenset[str], sketch: int = 0) -> codec.Message:
        """The message in a buffer to or from this client, whose tensors are at most those of `kinds`.

        Raises FedtriError where it is too long, altered, of another run, client or configuration, or not finite.
        """
        shapes = {key: shape for key, shape in self.layout.shapes(rank).items() if key.factor in kinds}
        limit = codec.most_bytes(shapes, self.dtype, sketch)
        message = codec.decode(data, self.layout, shapes, self.seal(client), limit)
        codec.check_norms(message.factors, self.norm_bound)
        return message


@dataclass(frozen=True)
class Sizes:
    """What a sketch may look like: classes, and the width of a feature."""

    classes: int
    features: int
