"""Laws of a site's journal: whatever round a server resumes with, the site goes back to its state before that round."""

import pytest
import torch

from fedtri.adapters.layout import Key
from fedtri.deploy.journal import Journal, moment
from fedtri.errors import FedtriError
from fedtri.storage.checkpoint import KEPT

KEY = Key("one", "A")


def number(journal: Journal, when) -> float:
    """What the client held before this moment; -1 where it held nothing."""
    held = journal.before(when, when[0]).load("a")
    return -1.0 if held is None else float(held[KEY])


def played(folder, rounds: int) -> float:
    """A run of so many rounds and the training of one more; every save is of a number of its own, the last is given."""
    count = 0.0
    steps = [step for round in range(rounds) for step in (("train", round), ("evaluate", round + 1))]
    for phase, round in [*steps, ("train", rounds)]:
        when = moment(phase, round)
        journal = Journal(folder)
        store = journal.before(when, when[0])
        count += 1
        store.save("a", {KEY: torch.tensor(count)}, f"{count:03.0f}")
        journal.commit(when, store)
    return count


@pytest.mark.parametrize("back", range(KEPT))
def test_the_site_goes_back_to_any_round_that_the_server_can_resume_with(back, tmp_path):
    """The server keeps the checkpoints of its last KEPT rounds, and has asked for training once more.

    Seen to fail with the journal keeping one round less than the server.
    """
    rounds = 5
    last = played(tmp_path, rounds)
    asked_again = moment("train", rounds - back)
    assert number(Journal(tmp_path), asked_again) == last - 1 - 2 * back


def test_a_round_before_those_is_refused_with_what_to_do(tmp_path):
    played(tmp_path, 5)
    with pytest.raises(FedtriError, match=r"round 2 is asked for, but states are kept from round \d on; the server"):
        Journal(tmp_path).before(moment("train", 1), 1)


def test_what_came_after_is_forgotten_and_its_files_with_it(tmp_path):
    last = played(tmp_path, 3)
    when = moment("train", 3)
    journal = Journal(tmp_path)
    store = journal.before(when, when[0])
    assert max(journal.states) < when
    store.save("a", {KEY: torch.tensor(last)}, "again")
    journal.commit(when, store)
    kept = {saved.file for files in journal.states.values() for saved in files.values()}
    assert {f"a/{path.name}" for path in (tmp_path / "a").iterdir()} == kept


def test_training_that_the_server_did_not_use_has_not_been(tmp_path):
    """Rounds 1 and 2 were used; the answer of round 3 came too late, so round 4 starts from round 2's delivery.

    Seen to fail with the newest state before round 4.
    """
    played(tmp_path, 2)  # saves 1 to 5; the last is round 3's training
    journal = Journal(tmp_path)
    assert float(journal.before(moment("train", 3), 2).load("a")[KEY]) == 4
    assert max(Journal(tmp_path).states) == moment("evaluate", 2)


def test_who_is_sent_everything_anew_keeps_what_it_has_where_its_beginning_is_gone(tmp_path):
    last = played(tmp_path, 5)
    assert float(Journal(tmp_path).before(moment("evaluate", 6), 0).load("a")[KEY]) == last


def test_a_first_request_finds_nothing(tmp_path):
    assert number(Journal(tmp_path), moment("train", 0)) == -1


def test_a_journal_that_cannot_be_read_says_what_to_do(tmp_path):
    (tmp_path / "journal.json").write_text("[{")
    with pytest.raises(FedtriError, match="move the folder away to start this client anew"):
        Journal(tmp_path)
