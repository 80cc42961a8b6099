"""What the machine can do and what a process takes of it: its matrix-product rate, its name, a process's memory."""

import os
import platform
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil


def cpu() -> str:
    """The processor's name, where the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def versions(*names: str) -> str:
    """Python's version and those of these packages, where they are installed."""
    found = [f"python {platform.python_version()}"]
    for name in names:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found)


def matrix_rate(
    hidden: int, inner: int, *, tokens: int = 512, threads: int = 2, seconds: float = 1.0
) -> tuple[float, float]:
    """FLOP/s of float32 products at a transformer layer's shapes, as its linear layers share them out.

    Four products hidden × hidden, one up to `inner` and one back. Tried both as one product on all threads and as one
    product a thread side by side; the better is the machine's. The second number counts the seconds in which a core
    worked for us, whoever else had the machine meanwhile.
    """
    import torch

    shapes = [(hidden, hidden)] * 4 + [(hidden, inner), (inner, hidden)]
    flop = sum(2 * tokens * d_in * d_out for d_in, d_out in shapes)
    pairs = [(torch.randn(tokens, d_in), torch.randn(d_out, d_in)) for d_in, d_out in shapes]

    def work(until: float) -> int:
        out = [torch.empty(tokens, d_out) for _, d_out in shapes]
        layers = 0
        while time.perf_counter() < until:
            for (x, weight), y in zip(pairs, out, strict=True):
                torch.mm(x, weight.t(), out=y)
            layers += 1
        return layers

    torch.set_num_threads(threads)
    start = time.perf_counter()
    together = work(start + seconds / 2) * flop / (time.perf_counter() - start)
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        start, worked = time.perf_counter(), time.process_time()
        done = sum(pool.map(work, [start + seconds / 2] * threads)) * flop
        apart = done / (time.perf_counter() - start)
        working = done / (time.process_time() - worked) * threads
    return max(together, apart), working


def cpu_seconds(pid: int) -> float:
    """Seconds that cores have worked for a process and its children so far."""
    total = 0.0
    for process in _family(pid):
        with suppress(psutil.Error):  # it ended meanwhile
            times = process.cpu_times()
            total += times.user + times.system + times.children_user + times.children_system  # of those that ended
    return total


def suspend(pid: int) -> None:
    """Stop a process and its children where they are, so that they take nothing from others."""
    for process in _family(pid):
        with suppress(psutil.Error):
            process.suspend()


def resume(pid: int) -> None:
    """Let them go on."""
    for process in _family(pid):
        with suppress(psutil.Error):
            process.resume()


def _family(pid: int) -> list[psutil.Process]:
    """A process and all that it started; nothing once it has ended."""
    try:
        root = psutil.Process(pid)
        return [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def memory(pid: int) -> int:
    """Bytes that a process and its children hold now; a page that several share counts once in all (Linux's Pss)."""
    total = 0
    for process in _family(pid):
        try:
            rollup = Path(f"/proc/{process.pid}/smaps_rollup").read_text()
        except OSError:  # it ended meanwhile, or the system has no such file
            continue
        total += next(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:")) * 1024
    return total


@contextmanager
def peak_memory(pid: int, every: float = 0.1) -> Iterator[Callable[[], int]]:
    """The largest `memory` seen of a process while the block runs, looked at every so many seconds."""
    seen, done = [memory(pid)], threading.Event()

    def look() -> None:
        while not done.wait(every):
            seen.append(memory(pid))

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield lambda: max(seen)
    finally:
        done.set()
        thread.join()


def gpu() -> str:
    """The GPU, or that there is none: then nothing is said of one."""
    import torch

    return f"GPU: {torch.cuda.get_device_name()}" if torch.cuda.is_available() else "No GPU at hand: none was measured."


def describe() -> str:
    """Processor, cores and load."""
    return f"{cpu()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the start"
