"""Clients side by side in threads: PyTorch lets go of the interpreter inside its kernels."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")
Stop = Callable[[], bool]


def side_by_side(jobs: Sequence[Callable[[Stop], T]]) -> list[T]:
    """Each job's result, in order; the jobs share PyTorch's threads, and a job alone has them all.

    Every job is given `stop()`, which says True once another job failed or the caller was interrupted.
    """
    threads = torch.get_num_threads()
    workers = min(threads, len(jobs))
    if workers <= 1:
        return [job(lambda: False) for job in jobs]
    stopped = threading.Event()
    try:
        with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(threads // workers,)) as pool:
            futures = [pool.submit(job, stopped.is_set) for job in jobs]
            try:
                return [future.result() for future in futures]
            except BaseException:
                stopped.set()
                pool.shutdown(cancel_futures=True)
                raise
    finally:
        torch.set_num_threads(threads)
