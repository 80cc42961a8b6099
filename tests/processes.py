"""Processes that tests kill and interrupt: forked from the test's own, in which the libraries are loaded already.

A process that imports PyTorch and transformers costs as much as a hundred runs of the tiny models.
"""

import os
import runpy
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")


@dataclass
class Child:
    """A process that a test has started.

    `output` and `errors` are files that hold what it wrote; `code` is its exit code once it has ended, -9 where it was
    killed with SIGKILL, None while it runs.
    """

    pid: int
    output: Path
    errors: Path
    code: int | None = None

    def running(self) -> bool:
        """Whether it has not ended yet."""
        if self.code is None and (ended := os.waitpid(self.pid, os.WNOHANG))[0]:
            self.code = os.waitstatus_to_exitcode(ended[1])
        return self.code is None

    def until(self, found: Callable[[], T], seconds: float = 120) -> T:
        """The first true value, for which it waits. Fails where the process ends before, or it takes longer."""
        stop = time.monotonic() + seconds
        while not (value := found()):
            assert self.running(), f"ended with {self.code}: {self.errors.read_text()}"
            assert time.monotonic() < stop, f"not within {seconds:g} s: {self.output.read_text()}"
            time.sleep(0.002)
        return value

    def wait(self, seconds: float = 120) -> int:
        """Its exit code, once it has ended."""
        stop = time.monotonic() + seconds
        while self.running():
            assert time.monotonic() < stop, f"still running after {seconds:g} s: {self.output.read_text()}"
            time.sleep(0.002)
        assert self.code is not None
        return self.code

    def send(self, number: signal.Signals) -> None:
        """Send it a signal."""
        if self.running():
            os.kill(self.pid, number)

    def kill(self) -> None:
        """End it at once, as kill -9 does; nothing happens where it has ended."""
        self.send(signal.SIGKILL)
        self.wait()


def fork(folder: Path, run: Callable[[], object]) -> Child:
    """Call `run` in a process of its own, the leader of a process group, that hears Ctrl-C as a shell's command does.

    What it prints goes into files under `folder`. Its exit code is that of its SystemExit, 1 after another exception.
    """
    folder.mkdir(parents=True, exist_ok=True)
    output, errors = folder / "output", folder / "errors"
    sys.stdout.flush()
    sys.stderr.flush()
    for file in (output, errors):
        file.touch()
    if pid := os.fork():
        return Child(pid, output, errors)
    code = 1
    try:
        os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with output.open("w", buffering=1) as out, errors.open("w", buffering=1) as err:
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)
            sys.stdout, sys.stderr = out, err
            try:
                run()
                code = 0
            except SystemExit as end:
                code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
            except BaseException:
                traceback.print_exc()
    finally:
        os._exit(code)  # nothing of the test session may run on in the child, fixtures least of all


def script(folder: Path, path: Path | str, *arguments: str) -> Child:
    """A Python script in a process of its own, as the shell would start it."""

    def run() -> None:
        sys.argv = [str(path), *arguments]
        sys.path.insert(0, str(Path(path).parent))
        runpy.run_path(str(path), run_name="__main__")

    return fork(folder, run)


def fedtri(folder: Path, *words: object) -> Child:
    """`fedtri WORDS` in a process of its own."""

    def run() -> None:
        from fedtri.cli import main

        sys.argv = ["fedtri", *map(str, words)]
        main.main()

    return fork(folder, run)
