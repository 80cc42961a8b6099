"""The embedded texts: first paragraphs of installed docstrings. The label is the library that a text comes from.

There are six classes: the standard library, numpy, scipy, scikit-learn, torch and transformers. Their files are read
with `ast` and never imported. A text is the first paragraph of the docstring of a module, class or function, on one
line, 20 to 200 characters long. These texts are dropped:

- texts that name a library and so give the label away: any of the six, its import name or usual alias, its publisher
  ("Python" stands for the standard library);
- field headings and doctests;
- repetitions within a library, and all copies of a text that occurs in two libraries;
- texts in test code.

Files are read in a fixed order (by a hash of their path) until a class has `SURPLUS` texts. Of these, `CAP` are drawn
with a fixed seed. So the pool depends only on the installed versions. It is cached as JSON, under these versions.
"""

import ast
import gc
import hashlib
import importlib.util
import json
import os
import platform
import random
import re
import sysconfig
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path

import pyarrow as pa

from fedtri import atomic
from fedtri.data.pool import Source
from fedtri.errors import FedtriError

RECIPE = 1  # part of the cache's key: raise it whenever the rules below change
CAP = 1200
SURPLUS = CAP * 3 // 2
STDLIB = "python"
DISTRIBUTIONS = {
    "numpy": "numpy",
    "scikit-learn": "sklearn",
    "scipy": "scipy",
    "torch": "torch",
    "transformers": "transformers",
}
LIBRARIES = (STDLIB, *DISTRIBUTIONS)
UNREAD = {"test", "tests", "testing", "idle_test", "site-packages", "dist-packages"}
NAMES = re.compile(
    r"python|numpy|\bnp\.|scipy|scikit|sklearn|torch|transformers|hugging ?face|standard library|stdlib",
    re.IGNORECASE,
)
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def load() -> Source:
    """The texts, from the cache or else from the libraries. Raises FedtriError if a library is missing."""
    path = cache_path(installed())
    texts = read_cache(path)
    if texts is None:
        with no_collector():
            texts = collect({library: root(library) for library in LIBRARIES})
        write_cache(path, texts)
    rows = [(text, library) for library in LIBRARIES for text in texts[library]]
    table = pa.table({"text": [text for text, _ in rows], "label": [library for _, library in rows]})
    columns = {"text": "text", "label": "label"}
    return Source("docstrings", "docstrings", table, columns, {"label": {name: name for name in LIBRARIES}})


@contextmanager
def no_collector() -> Iterator[None]:
    """Switch the garbage collector off. It took half of the time (measured), although syntax trees have no cycles."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def installed() -> dict[str, str]:
    """The version of each library. Raises FedtriError that names a missing one."""
    found = {STDLIB: platform.python_version()}
    for distribution in DISTRIBUTIONS:
        try:
            found[distribution] = metadata.version(distribution)
        except metadata.PackageNotFoundError:
            raise FedtriError(
                f'data "docstrings": {distribution} is not installed, expected all of '
                f"{', '.join(DISTRIBUTIONS)}; install it or name another source"
            ) from None
    return found


def root(library: str) -> Path:
    """The folder of a library's source files, found without importing the library."""
    if library == STDLIB:
        return Path(sysconfig.get_path("stdlib"))
    spec = importlib.util.find_spec(DISTRIBUTIONS[library])
    if spec is None or spec.origin is None:
        raise FedtriError(f'data "docstrings": the sources of {library} were not found; reinstall it')
    return Path(spec.origin).parent


def collect(roots: Mapping[str, Path]) -> dict[str, list[str]]:
    """At most `CAP` texts of every library. No text is in two libraries."""
    found = {library: texts_of(folder) for library, folder in roots.items()}
    seen = Counter(text.casefold() for texts in found.values() for text in texts)
    chosen = {}
    for library, texts in found.items():
        own = sorted(text for text in texts if seen[text.casefold()] == 1)
        chosen[library] = random.Random(0).sample(own, min(CAP, len(own)))
    return chosen


def texts_of(folder: Path) -> list[str]:
    """Up to `SURPLUS` usable texts under a folder, each once."""
    files = [file.relative_to(folder) for file in folder.rglob("*.py")]
    files = [file for file in files if UNREAD.isdisjoint(file.parts)]
    texts: dict[str, str] = {}
    for file in sorted(files, key=lambda file: hashlib.sha256(file.as_posix().encode()).digest()):
        for text in paragraphs(folder / file):
            if usable(text):
                texts.setdefault(text.casefold(), text)
        if len(texts) >= SURPLUS:
            break
    return list(texts.values())


def usable(text: str) -> bool:
    """Whether a text has the right length, is prose, and names no library."""
    heading_or_doctest = text.endswith(":") or ">>>" in text
    return 20 <= len(text) <= 200 and text.isprintable() and not heading_or_doctest and not NAMES.search(text)


def paragraphs(file: Path) -> Iterator[str]:
    """The first paragraph of every docstring in a file, each on one line; nothing if Python cannot parse the file."""
    try:
        with warnings.catch_warnings(action="ignore"):  # invalid escapes in other people's strings
            pending: list[ast.AST] = [ast.parse(file.read_bytes())]
    except (SyntaxError, ValueError, OSError, RecursionError):
        return
    while pending:
        node = pending.pop()
        if isinstance(node, DOCUMENTED):
            docstring = ast.get_docstring(node, clean=False) or ""
            yield " ".join(re.split(r"\n\s*\n", docstring.strip(), maxsplit=1)[0].split())
            pending.extend(node.body)  # expressions hold no docstrings, and to walk them took half of the time


def cache_path(versions: Mapping[str, str]) -> Path:
    """The cache file for these versions."""
    key = hashlib.sha256(json.dumps([RECIPE, sorted(versions.items())]).encode()).hexdigest()[:16]
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(home) / "fedtri" / f"docstrings-{key}.json"


def read_cache(path: Path) -> dict[str, list[str]] | None:
    """The cached texts; None if there are none or the file is damaged."""
    try:
        cached = json.loads(path.read_bytes())
        texts = {library: cached["texts"][library] for library in LIBRARIES}
        digest = cached["digest"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return texts if digest == digest_of(texts) else None


def write_cache(path: Path, texts: Mapping[str, list[str]]) -> None:
    """Keep the texts for the next run, all or nothing. A place that cannot be written to is no error."""
    with suppress(OSError):
        atomic.write_text(path, json.dumps({"digest": digest_of(texts), "texts": texts}))


def digest_of(texts: Mapping[str, list[str]]) -> str:
    """A digest of the texts, to recognise a damaged cache."""
    return hashlib.sha256(json.dumps(texts, sort_keys=True).encode()).hexdigest()
