"""Which of a site's files were current after each phase of a run, so that a round can be repeated exactly.

A server that was killed resumes at its last checkpoint and asks for a round that the site has done already. The site
then goes back to its own state before that round. It does so, too, where the server never used its answer, such as one
that came after the deadline: that round has not been. It keeps as many rounds as the server keeps checkpoints.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from fedtri import atomic
from fedtri.errors import FedtriError
from fedtri.messages import Phase
from fedtri.storage.checkpoint import KEPT
from fedtri.storage.client_store import ClientStore, Saved

Moment = tuple[int, int]
"""(rounds finished, 0 after training or 1 after delivery): the order in which a client's state changes."""
NOTHING: Moment = (0, 0)


def moment(phase: Phase, round: int) -> Moment:
    """The moment at which this phase of this round (counted from 0) ends."""
    return (round + 1, 0) if phase == "train" else (round, 1)


class Journal:
    """One client's states in one run, under a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / "journal.json"
        self.states: dict[Moment, dict[str, Saved]] = {NOTHING: {}}
        if self.path.exists():
            self.states = _read(self.path)

    def before(self, when: Moment, used: int) -> ClientStore:
        """The client's files as they were before this moment; what came later, or was of no use, is forgotten.

        Args:
            when: The moment at which the phase that is asked for ends.
            used: The last round, counted from 1, of which the server used the client's training; 0: none.

        Raises:
            FedtriError: Where the round lies further back than is kept.
        """
        there = [one for one in self.states if one < when]
        # a client that is sent everything anew, and whose beginning is not kept any more, goes on with what it has
        known = used > 0 or NOTHING in there
        unused = min((one for one in there if known and one[0] > used and one[1] == 0), default=when)
        earlier = [one for one in there if one < unused]
        if not earlier:
            raise FedtriError(
                f"{self.path}: round {when[0]} is asked for, but states are kept from round {min(self.states)[0] + 1} "
                "on; the server must resume from a later checkpoint"
            )
        last = max(earlier)
        self.states = {one: files for one, files in self.states.items() if one <= last}
        self._write()
        return ClientStore(self.folder, self.states[last])

    def commit(self, when: Moment, store: ClientStore) -> None:
        """Remember the store's current files as the state at this moment, and drop what is no longer needed."""
        self.states[when] = dict(store.current)
        needed = max((one for one in self.states if one < (when[0] - KEPT + 1, 0)), default=min(self.states))
        self.states = {one: files for one, files in self.states.items() if one >= needed}
        self._write()
        store.prune({saved.file for files in self.states.values() for saved in files.values()})

    def newest(self) -> ClientStore:
        """The client's files as they are now."""
        return ClientStore(self.folder, self.states[max(self.states)])

    def _write(self) -> None:
        rows = [
            {"round": round, "delivered": part, "files": {name: asdict(saved) for name, saved in files.items()}}
            for (round, part), files in sorted(self.states.items())
        ]
        atomic.write_bytes(self.path, json.dumps(rows).encode())


def _read(path: Path) -> dict[Moment, dict[str, Saved]]:
    try:
        rows: list[Mapping[str, object]] = json.loads(path.read_text())
        return {
            (int(row["round"]), int(row["delivered"])): {n: Saved(**f) for n, f in row["files"].items()}  # pyright: ignore
            for row in rows
        } or {NOTHING: {}}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise FedtriError(f"{path}: cannot be read: {error}; move the folder away to start this client anew") from None
