"""Clients side by side: on Linux in processes forked for the occasion, elsewhere in threads.

PyTorch lets go of the interpreter inside kernels, but short ones leave threads waiting for each other's Python. A
forked process starts with all that its parent holds, copied only where one of them writes; what it leaves behind has to
be in its result or in memory from `shared`.
"""

import ctypes
import math
import mmap
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from importlib import import_module
from typing import Any, TypeVar

import torch
from torch import Tensor

from fedtri.errors import FedtriError

T = TypeVar("T")
HEARING = 0.1
"""Seconds between two looks at what jobs tell."""


@dataclass(frozen=True)
class Worker:
    """What a job is given of those around it."""

    stop: Callable[[], bool] = lambda: False
    """Whether another job failed or the caller was interrupted: then the job's result is not wanted any more."""
    tell: Callable[..., None] = lambda *said: None
    """Passes its arguments to the caller's `heard`."""


Job = Callable[[Worker], T]
_here: tuple[Sequence[Job[Any]], Worker] = ((), Worker())
"""In a forked process: the jobs that it may be asked to do."""


def side_by_side(
    jobs: Sequence[Job[T]], heard: Callable[..., None] = lambda *said: None, *, apart: bool = False
) -> list[T]:
    """Each job's result, in order; the jobs share PyTorch's threads, and a job alone has them all.

    Args:
        heard: Called in the caller's thread with what jobs tell.
        apart: Whether jobs change what they share, as a model that they load a client into: then each worker is a
            process of its own, with a copy of its own, and where none can be forked off the jobs take turns.

    Raises:
        FedtriError: Where a process dies. What a job raises comes as it is.
    """
    threads = torch.get_num_threads()
    workers = min(threads, len(jobs))
    forked = forks() and threads // max(workers, 1) == 1  # OpenMP's threads do not survive a fork
    if workers <= 1 or (apart and not forked):
        return [job(Worker(tell=heard)) for job in jobs]
    context = multiprocessing.get_context("fork" if forked else None)
    mail, stopped = context.SimpleQueue(), context.Event()
    worker = Worker(stopped.is_set, lambda *said: mail.put(said))
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # else it warns of every fork
    if forked:
        pool, call = ProcessPoolExecutor(workers, context, initializer=_begin, initargs=(jobs, worker)), _numbered
    else:
        pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(threads // workers,))
        call = lambda number: jobs[number](worker)  # noqa: E731
    futures: list[Future[T]] = []
    try:
        with pool:
            try:
                futures += (pool.submit(call, number) for number in range(len(jobs)))
                waiting = set(futures)
                while waiting:
                    done, waiting = wait(waiting, timeout=HEARING)
                    _hear(mail, heard)
                    for future in done:
                        future.result()
            except BaseException:
                stopped.set()
                waiting = {future for future in futures if not future.cancel()}
                while waiting:  # a worker that finds its pipe full would never stop
                    waiting = wait(waiting, timeout=HEARING).not_done
                    _hear(mail, lambda *said: None)
                raise
        return [future.result() for future in futures]
    except BrokenProcessPool as error:
        why = str(error.__cause__ or "").strip().splitlines()[-1:] or ["for want of memory perhaps"]
        raise FedtriError(
            f"a process that worked for this one ended before its time ({why[0]}): {workers} shared the machine; "
            f"OMP_NUM_THREADS={workers - 1} makes it fewer"
        ) from None
    finally:
        torch.set_num_threads(threads)


def _hear(mail: Any, heard: Callable[..., None]) -> None:
    while not mail.empty():
        heard(*mail.get())


def forks() -> bool:
    """Whether processes can be forked off here that train: not where PyTorch keeps threads for a GPU's gradients."""
    return sys.platform == "linux" and not torch.accelerator.is_available()


def shared(value: Tensor) -> Tensor:
    """A copy of a CPU tensor in memory that forked processes share; the tensor itself where none are forked."""
    if not forks() or value.device.type != "cpu" or not value.numel():
        return value
    return empty_shared(value.shape, value.dtype).copy_(value)


def empty_shared(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """An uninitialised tensor in memory that forked processes share."""
    if not forks() or not (count := math.prod(shape)):
        return torch.empty(*shape, dtype=dtype)
    # nameless, so that a container's small /dev/shm does not limit it
    return torch.frombuffer(mmap.mmap(-1, count * dtype.itemsize), dtype=dtype, count=count).view(*shape)


def _begin(jobs: Sequence[Job[Any]], worker: Worker) -> None:
    """In a forked process, before its first job."""
    global _here
    _here = jobs, worker
    torch.set_num_threads(1)
    if "sklearn" in sys.modules:  # its OpenMP is not PyTorch's
        import_module("threadpoolctl").threadpool_limits(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent says when to stop
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: nobody waits for what an orphan finds


def _numbered(number: int) -> Any:
    jobs, worker = _here
    return jobs[number](worker)
