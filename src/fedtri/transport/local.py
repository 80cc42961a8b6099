"""The in-process transport: every task and reply passes through the same bytes as on a network, and is counted."""

from collections.abc import Sequence

from fedtri import sketch, wire
from fedtri.client import Site, client_update, rounded
from fedtri.types import POOLED, Answer, Key, Reply, Task


class LocalTransport:
    """All clients of a site, a cohort at a time."""

    def __init__(self, site: Site, dtype: str = "float32") -> None:
        self.site, self.dtype = site, dtype

    def clients(self) -> list[str]:
        """The ids of the site's clients, sorted."""
        return sorted(client for client in self.site.splits if client != POOLED)

    def exchange(self, tasks: Sequence[Task]) -> list[Answer]:
        """Encode each task, answer it in cohorts, and decode each reply's bytes."""
        size = self.site.cohort.clients
        answers = []
        for start in range(0, len(tasks), size):
            answers += self._cohort(tasks[start : start + size])
        return answers

    def _cohort(self, tasks: Sequence[Task]) -> list[Answer]:
        sent = [self.encode(task) for task in tasks]
        received = self.serve([task.client for task in tasks], sent)
        return [
            Answer(self.read(up, task.client), len(up), len(down))
            for task, down, up in zip(tasks, sent, received, strict=True)
        ]

    def encode(self, task: Task) -> bytes:
        """A task's bytes."""
        message = wire.Message(task.phase, task.round, task.down)
        return wire.encode(message, self.site.cohort.layout, self.dtype)

    def serve(self, clients: Sequence[str], sent: Sequence[bytes]) -> list[bytes]:
        """The clients' half: their replies' bytes to the bytes of tasks of one phase, at most a cohort of them."""
        layout, tasks = self.site.cohort.layout, []
        for client, data in zip(clients, sent, strict=True):
            message = wire.decode(data, layout, self._shapes(client))
            tasks.append(Task(message.phase, message.round, client, message.factors))
        said = []
        for reply in client_update(self.site, tasks):
            message = wire.Message(
                phase=tasks[0].phase,
                round=reply.round,
                factors=rounded(self.site.store, reply, self.dtype).up,
                num_examples=reply.num_examples,
                metrics=reply.metrics,
                sketch=b"" if reply.sketch is None else sketch.encode(reply.sketch),
            )
            said.append(wire.encode(message, layout, self.dtype))
        return said

    def read(self, data: bytes, client: str) -> Reply:
        """A client's reply from its bytes."""
        message = wire.decode(data, self.site.cohort.layout, self._shapes(client))
        task, model = self.site.task, self.site.cohort.model
        size = task.feature_size(model)
        found = sketch.decode(message.sketch, classes=task.classes, d=size) if message.sketch else None
        return Reply(client, message.round, message.factors, message.num_examples, message.metrics, found)

    def _shapes(self, client: str) -> dict[Key, tuple[int, ...]]:
        return self.site.cohort.layout.shapes(self.site.ranks[client])
