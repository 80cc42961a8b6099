"""Files and folders that appear whole or not at all: written beside their place, then renamed over it.

A reader, and a process that is killed in the middle, sees the old content or the new one, never a part.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def write_bytes(path: Path, data: bytes) -> str:
    """Write a file whole; its folder is made where it is absent. Returns the SHA-256 of the bytes, in hexadecimal.

    Raises OSError where the disk does not take it; what stood there before is then as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return hashlib.sha256(data).hexdigest()


def write_text(path: Path, text: str) -> None:
    """Write a text file whole, in UTF-8."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: object) -> None:
    """Write a value whole, as indented JSON."""
    write_text(path, json.dumps(value, indent=2) + "\n")


@contextmanager
def folder(path: Path) -> Iterator[Path]:
    """A folder to fill, which takes its place at `path` when the block ends, and is removed where the block fails.

    `path` must be absent or an empty folder.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        yield part
        part.replace(path)
    finally:
        shutil.rmtree(part, ignore_errors=True)
