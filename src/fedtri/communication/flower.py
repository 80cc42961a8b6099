"""The network transport: the same buffers as in one process, one a message, over Flower's grid with a deadline.

A client's name is the one under which the server's operator registered its key (`flwr supernode register --name`);
nothing that a client says can change it. A client that is late, offline, fails or sends what cannot be used is named
and logged, and costs the other clients nothing.
"""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import httpx
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.common.constant import ErrorCode

from fedtri.communication.codec import Codec
from fedtri.communication.flower_calls import BEHIND, BODY, FAILED, PREFIX, STAGE, Grid
from fedtri.config import Network
from fedtri.errors import FedtriError
from fedtri.messages import Answer, Failure, Request
from fedtri.metrics import Phase

LOG = logging.getLogger("flwr")
POLL = 0.5
"""Seconds between two looks at what has arrived."""
LEAST = 1.0
"""The least seconds that a message may take; with less time left a client is not asked again."""
MESSAGES: dict[Phase, str] = {"basis": "query", "sketch": "query", "train": "train", "evaluate": "evaluate"}


@dataclass
class _Pending:
    request: Request
    body: bytes
    node: int
    sent: float
    retries: int


class FlowerTransport:
    """The server's end: clients are the registered nodes that are online and named in the configuration."""

    def __init__(
        self, grid: Grid, codec: Codec, options: Network, turned_away: Callable[[], Sequence[str]] = tuple
    ) -> None:
        """`codec` is that of this run; `turned_away` gives the keys of nodes refused since it was last asked."""
        self.grid, self.codec, self.options, self.turned_away = grid, codec, options, turned_away
        self.examples: dict[str, int] = {}
        """Training examples of every client heard of."""
        self._strangers: set[int] = set()

    def clients(self) -> list[str]:
        """The names of the clients that are online; waits for `minimum` of them, at most `patience` seconds.

        Raises FedtriError where they do not come.
        """
        until = time.monotonic() + self.options.patience
        told = False
        while len(found := self._nodes()) < self.options.minimum:
            if time.monotonic() > until:
                raise FedtriError(
                    f"network: {len(found)} of {len(self.options.clients)} clients are online after "
                    f"{self.options.patience:g} s, expected at least {self.options.minimum}; start the others' "
                    "SuperNodes and run again: the run goes on where it stopped"
                )
            if not told:
                LOG.info("fedtri: %d clients are online, waiting for %d", len(found), self.options.minimum)
                told = True
            time.sleep(POLL)
        return sorted(found)

    def exchange(self, requests: Sequence[Request]) -> list[Answer | Failure]:
        """Ask all clients at once; returns when all have answered or failed, at the latest at the deadline."""
        until = time.monotonic() + self.options.deadline
        nodes, outcome = self._nodes(), list[Answer | Failure]()
        waiting: dict[str, _Pending] = {}
        for request in requests:
            if request.client in nodes:
                self._push(waiting, request, self._encode(request), nodes[request.client], until, 0)
            else:
                outcome.append(self._failure(request.client, "is offline"))
        while waiting:
            for number, pending in list(waiting.items()):
                outcome += self._pull(waiting, number, pending, until)
            if waiting and time.monotonic() > until:
                break
            if waiting:
                time.sleep(POLL)
        for pending in waiting.values():
            why = f"no answer within {self.options.deadline:g} s"
            outcome.append(self._failure(pending.request.client, why, retries=pending.retries))
        for key in self.turned_away():
            outcome.append(self._failure(key, "a node with this key, which is not registered", refused=True))
        return outcome

    def _nodes(self) -> dict[str, int]:
        """The node of each configured client that is online."""
        found: dict[str, int] = {}
        twice = set()
        for node in self.grid.get_nodes():
            if node.name in found:
                twice.add(node.name)
            if node.name in self.options.clients:
                found[node.name] = node.node_id
            elif node.node_id not in self._strangers:
                self._strangers.add(node.node_id)
                LOG.warning(
                    "fedtri: node %d is registered under no name of network.clients and takes no part; "
                    "register it with `flwr supernode register KEY.pub --name CLIENT`", node.node_id,
                )  # fmt: skip
        if twice:
            raise FedtriError(f"network: two nodes are registered as {min(twice)}; unregister one of them")
        return found

    def _encode(self, request: Request) -> bytes:
        name = request.client.encode()
        return PREFIX.pack(self.codec.run, len(name)) + name + self.codec.write_request(request)

    def _push(
        self, waiting: dict[str, _Pending], request: Request, body: bytes, node: int, until: float, retries: int
    ) -> None:
        message = Message(
            RecordDict({BODY: ConfigRecord({BODY: body})}), dst_node_id=node, message_type=MESSAGES[request.phase],
            ttl=max(until - time.monotonic(), LEAST), group_id=str(request.round + 1),
        )  # fmt: skip
        (number,) = self.grid.push_messages([message])
        waiting[number] = _Pending(request, body, node, time.monotonic(), retries)

    def _pull(
        self, waiting: dict[str, _Pending], number: str, pending: _Pending, until: float
    ) -> list[Answer | Failure]:
        """What has arrived for this message. Each is asked for alone, so that one client's answer harms no other."""
        client = pending.request.client
        try:
            replies = list(self.grid.pull_messages([number]))
        except httpx.HTTPError:
            raise
        except Exception as error:  # a hostile message may make Flower's reader raise anything; only its client pays
            del waiting[number]
            return [self._failure(client, f"a message that Flower cannot read ({type(error).__name__})", refused=True)]
        if not replies:
            return []
        del waiting[number]
        first, *more = replies
        outcome: list[Answer | Failure] = [self._failure(client, "answered twice", refused=True) for _ in more]
        try:
            return [self._read(first, pending), *outcome]
        except _BehindError as behind:
            return [self._failure(client, str(behind), behind=True, retries=pending.retries), *outcome]
        except _LateError as late:
            return [self._failure(client, str(late), retries=pending.retries), *outcome]
        except _ClientError as failed:
            if pending.retries < self.options.retries and time.monotonic() < until - LEAST:
                LOG.warning("fedtri: %s: %s; asking again", client, failed)
                self._push(waiting, pending.request, pending.body, pending.node, until, pending.retries + 1)
                return outcome
            return [self._failure(client, str(failed), retries=pending.retries), *outcome]
        except FedtriError as error:
            return [self._failure(client, str(error), refused=True, retries=pending.retries), *outcome]

    def _read(self, message: Message, pending: _Pending) -> Answer:
        """The answer in a reply.

        Raises FedtriError where it cannot be used, _ClientError where the client failed, _LateError where it is gone,
        _BehindError where it has lost what it was sent.
        """
        if message.has_error():
            if message.error.code in (ErrorCode.MESSAGE_UNAVAILABLE, ErrorCode.REPLY_MESSAGE_UNAVAILABLE):
                raise _LateError(f"no answer within {self.options.deadline:g} s")
            if message.error.code == ErrorCode.NODE_UNAVAILABLE:
                raise _LateError("went offline")
            raise _ClientError(f"failed with Flower's error {message.error.code}; the reason is in the site's own log")
        record = message.content.config_records.get(BODY) or {}
        if (stage := record.get(FAILED)) == BEHIND:
            raise _BehindError("has lost what it was sent before, and is sent all it needs")
        if isinstance(stage, str) and STAGE.fullmatch(stage):
            raise _ClientError(f"failed while {stage}; the reason is in the site's own log")
        if not isinstance(body := record.get(BODY), bytes):
            raise FedtriError("wire: the reply holds no buffer")
        if message.metadata.src_node_id != pending.node:
            raise FedtriError("wire: the reply is of another node than was asked")
        reply = self.codec.read_reply(body, pending.request)
        self.examples[reply.client] = reply.num_examples
        spent = time.monotonic() - pending.sent
        held = self.codec.held(pending.request)
        return Answer(reply, len(body), len(pending.body), spent, pending.retries, held)

    def _failure(
        self, client: str, why: str, *, refused: bool = False, behind: bool = False, retries: int = 0
    ) -> Failure:
        LOG.warning("fedtri: %s: %s%s", client, "refused: " if refused else "", why)
        return Failure(client, f"{client}: {why}", refused, retries, behind)


class _LateError(Exception):
    """A client that can no longer answer in this phase."""


class _BehindError(Exception):
    """A client that says it no longer has what the request builds on."""


class _ClientError(Exception):
    """A client that says it failed, which may be asked again."""
