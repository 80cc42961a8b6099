"""The in-process transport: every task and reply passes through the same bytes as on a network, and is counted."""

from collections.abc import Sequence
from dataclasses import replace

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
        layout = self.site.cohort.layout
        sent = [wire.encode(wire.Message(t.phase, t.round, t.down), layout, self.dtype) for t in tasks]
        received = []
        for task, data in zip(tasks, sent, strict=True):
            message = wire.decode(data, layout, self._shapes(task.client))
            received.append(replace(task, phase=message.phase, round=message.round, down=message.factors))
        answers = []
        for data_down, reply in zip(sent, client_update(self.site, received), strict=True):
            message = wire.Message(
                phase=received[0].phase,
                round=reply.round,
                factors=rounded(self.site.store, reply, self.dtype).up,
                num_examples=reply.num_examples,
                metrics=reply.metrics,
                sketch=b"" if reply.sketch is None else sketch.encode(reply.sketch),
            )
            data = wire.encode(message, layout, self.dtype)
            answers.append(Answer(self._read(data, reply.client), len(data), len(data_down)))
        return answers

    def _read(self, data: bytes, client: str) -> Reply:
        message = wire.decode(data, self.site.cohort.layout, self._shapes(client))
        task, model = self.site.task, self.site.cohort.model
        size = task.feature_size(model)
        found = sketch.decode(message.sketch, classes=task.classes, d=size) if message.sketch else None
        return Reply(client, message.round, message.factors, message.num_examples, message.metrics, found)

    def _shapes(self, client: str) -> dict[Key, tuple[int, ...]]:
        return self.site.cohort.layout.shapes(self.site.ranks[client])
