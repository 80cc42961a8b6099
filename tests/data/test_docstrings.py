"""The embedded source: what it keeps, what it drops, and that its cache is neither needed nor trusted."""

from collections import Counter

import pytest

from fedtri.data import docstrings, load_pool
from fedtri.tasks.text_classification import pool as made

MODULE = '''"""First paragraph of
a module.

Second paragraph."""
import nothing_of_the_kind

class Thing:
    """A thing of some length or other."""

    async def method(self):
        "Returns what the method returns."

    def repeated(self):
        """A thing of some LENGTH or other."""

    def headed(self):
        """Arguments of this function:"""

    def short(self):
        """Too short."""

    def tell_tale(self):
        """Wraps a call of NumPy for convenience."""

    def long(self):
        """{long}"""
'''.replace("{long}", "long " * 50)


def test_what_is_kept(tmp_path):
    (tmp_path / "tests").mkdir()
    (tmp_path / "a.py").write_text(MODULE)
    (tmp_path / "b.py").write_text("this is not Python")
    (tmp_path / "tests" / "c.py").write_text('"""Texts of test code are not read."""')
    assert sorted(text.casefold() for text in docstrings.texts_of(tmp_path)) == [
        "a thing of some length or other.",
        "first paragraph of a module.",
        "returns what the method returns.",
    ]


@pytest.mark.parametrize(
    "name",
    [
        "Python",
        "np.array",
        "SciPy",
        "scikit-learn",
        "sklearn",
        "PyTorch",
        "torch.nn",
        "transformers",
        "stdlib",
    ],
)
def test_a_text_that_names_a_library_is_dropped(name):
    assert not docstrings.usable(f"Something that {name} offers as well.")


def test_a_text_of_two_libraries_belongs_to_neither(tmp_path):
    for library, own in (("one", "Only the first says so."), ("two", "Only the second says so.")):
        (tmp_path / library).mkdir()
        (tmp_path / library / "m.py").write_text(f'"""{own}"""\ndef f():\n    """Both of them have this."""')
    chosen = docstrings.collect({library: tmp_path / library for library in ("one", "two")})
    assert chosen == {"one": ["Only the first says so."], "two": ["Only the second says so."]}


@pytest.fixture
def collected(tmp_path, monkeypatch):
    """How often the sources were read, each library having three texts."""
    calls = []

    def collect(roots):
        calls.append(roots)
        return {library: [f"{library} {i}" for i in range(3)] for library in docstrings.LIBRARIES}

    monkeypatch.setattr(docstrings, "collect", collect)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return calls


def test_the_cache_is_used_and_rebuilt_when_damaged(tmp_path, collected):
    first, second = docstrings.load(), docstrings.load()
    assert first.table.equals(second.table)
    assert len(collected) == 1
    (cache,) = (tmp_path / "fedtri").iterdir()
    whole = cache.read_text()
    for damaged in ("", "[]", whole[:-20], whole.replace("numpy 1", "numpy 9")):
        cache.write_text(damaged)
        assert docstrings.load().table.equals(first.table)
        assert cache.read_text() == whole
    assert len(collected) == 5


def test_other_versions_have_another_cache(collected, monkeypatch):
    docstrings.load()
    monkeypatch.setattr(docstrings.metadata, "version", lambda name: "0")
    docstrings.load()
    assert len(collected) == 2


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path, collected, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert docstrings.load().table.num_rows == 18


@pytest.mark.slow
def test_the_installed_libraries_give_six_full_classes(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    pool = load_pool("docstrings", made)
    texts = pool.table["text"][:]
    counts = Counter(pool.table["label"])
    assert pool.label_names == ("python", "numpy", "scikit-learn", "scipy", "torch", "transformers")
    assert all(900 <= counts[label] <= 1200 for label in range(6)), counts
    assert len({text.casefold() for text in texts}) == len(texts)
    assert all(20 <= len(text) <= 200 and "\n" not in text for text in texts)
    assert texts == load_pool("docstrings", made).table["text"][:]
