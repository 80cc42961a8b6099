"""The in-process transport: every task and reply passes through the same bytes as on a network, and is counted."""

from collections.abc import Sequence

from fedtri.adapters.layout import Key
from fedtri.communication import codec
from fedtri.federation.client import Site, client_update, rounded
from fedtri.messages import POOLED, Answer, Reply, Request
from fedtri.similarity import sketches


class LocalTransport:
    """All clients of a site, a cohort at a time."""

    def __init__(self, site: Site, dtype: str = "float32") -> None:
        self.site, self.dtype = site, dtype

    def clients(self) -> list[str]:
        """The ids of the site's clients, sorted."""
        return sorted(client for client in self.site.splits if client != POOLED)

    def exchange(self, tasks: Sequence[Request]) -> list[Answer]:
        """Encode each task, answer it in cohorts, and decode each reply's bytes."""
        size = self.site.cohort.clients
        answers = []
        for start in range(0, len(tasks), size):
            answers += self._cohort(tasks[start : start + size])
        return answers

    def _cohort(self, tasks: Sequence[Request]) -> list[Answer]:
        sent = [self.encode(task) for task in tasks]
        received = self.serve([task.client for task in tasks], sent)
        return [
            Answer(self.read(up, task.client), len(up), len(down))
            for task, down, up in zip(tasks, sent, received, strict=True)
        ]

    def encode(self, task: Request) -> bytes:
        """A task's bytes."""
        message = codec.Message(task.phase, task.round, task.down)
        return codec.encode(message, self.site.cohort.layout, self.dtype)

    def serve(self, clients: Sequence[str], sent: Sequence[bytes]) -> list[bytes]:
        """The clients' half: their replies' bytes to the bytes of tasks of one phase, at most a cohort of them."""
        layout, tasks = self.site.cohort.layout, []
        for client, data in zip(clients, sent, strict=True):
            message = codec.decode(data, layout, self._shapes(client))
            tasks.append(Request(message.phase, message.round, client, message.factors))
        said = []
        for reply in client_update(self.site, tasks):
            message = codec.Message(
                phase=tasks[0].phase,
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
        message = codec.decode(data, self.site.cohort.layout, self._shapes(client))
        task, model = self.site.task, self.site.cohort.model
        size = task.feature_size(model)
        found = sketches.decode(message.sketch, classes=task.classes, d=size) if message.sketch else None
        return Reply(client, message.round, message.factors, message.num_examples, message.metrics, found)

    def _shapes(self, client: str) -> dict[Key, tuple[int, ...]]:
        return self.site.cohort.layout.shapes(self.site.ranks[client])
