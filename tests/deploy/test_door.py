"""Keys that the SuperLink turned away are told once, by the fingerprint that ssh-keygen shows."""

import shutil
import subprocess
from pathlib import Path

import pytest

from fedtri.deploy import certificates
from fedtri.deploy.door import MOST, NAMED, Door, fingerprint

SAYS = "ERROR flwr 2026 | x.py:1 | [code: 2002] Attempted to register SuperNode with public key: {!r}\n"


@pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="no ssh-keygen: apt-get install openssh-client")
def test_the_fingerprint_is_openssh_s(tmp_path):
    _, public = certificates.pair()
    (tmp_path / "key.pub").write_bytes(public)
    said = subprocess.run(["ssh-keygen", "-lf", tmp_path / "key.pub"], capture_output=True, text=True, check=True)
    assert fingerprint(public) == said.stdout.split()[1]
    assert fingerprint(b"no key") != fingerprint(b"none")


def test_who_is_turned_away_is_told_once_and_only_from_now_on(tmp_path):
    keys = [certificates.pair()[1] for _ in range(3)]
    log = tmp_path / "superlink.log"
    log.write_text(SAYS.format(keys[0]))
    door = Door(log)
    assert door.turned_away() == []
    with log.open("a") as file:
        file.write(2 * SAYS.format(keys[1]) + "Attempted to register SuperNode with public key: b'\\x'\n")
    assert sorted(door.turned_away()) == sorted([fingerprint(keys[1]), fingerprint(rb"b'\x'")])
    assert door.turned_away() == []
    log.write_text(SAYS.format(keys[2]))  # rotated
    assert door.turned_away() == [fingerprint(keys[2])]


def test_a_flooded_log_is_read_from_its_end(tmp_path):
    log, (_, key) = tmp_path / "superlink.log", certificates.pair()
    door = Door(log)
    log.write_text("x" * (2 * MOST) + SAYS.format(key))
    assert door.turned_away() == [fingerprint(key)]
    with log.open("a") as file:
        file.writelines(SAYS.format(b"stranger %d" % number) for number in range(2 * NAMED))
    assert len(door.turned_away()) == NAMED


def test_without_a_log_nobody_is_told_of(monkeypatch):
    monkeypatch.delenv("FLWR_HOME", raising=False)
    assert Door().turned_away() == []
    assert Door(Path("no such file")).turned_away() == []
