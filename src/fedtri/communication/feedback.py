"""Error feedback: what rounding a reply to int8 has lost stays home and joins the next reply. arXiv:1901.09847."""

from dataclasses import replace

from fedtri.communication import codec
from fedtri.messages import Reply
from fedtri.storage.client_store import ClientStore


def residual_id(client: str) -> str:
    """The name under which is kept what rounding to int8 has lost so far."""
    return f"{client}.residual"


def rounded(store: ClientStore, reply: Reply, dtype: str) -> Reply:
    """The reply as it is to be encoded in this number type, with error feedback where that is int8.

    x = up + e travels as Q(x), and e = x - Q(x) stays home for the next round. A reply that is not finite goes as it
    is, for the server to refuse.
    """
    if dtype != "int8" or not all(value.isfinite().all() for value in reply.up.values()):
        return reply
    lost = store.load(residual_id(reply.client)) or {}
    up = {key: value + lost[key] if key in lost else value for key, value in reply.up.items()}
    now = {key: value - codec.quantized(value, dtype) for key, value in up.items()}
    if now:
        store.save(residual_id(reply.client), {**lost, **now}, f"{reply.round + 1:05}-trained")
    return replace(reply, up=up)
