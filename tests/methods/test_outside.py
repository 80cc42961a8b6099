"""A method outside the package, as CONTRIBUTING.md tells a stranger: the page's own files are run here."""

import re
import sys
from pathlib import Path

import pytest

from fedtri import config
from fedtri.methods import lookup
from fedtri.report import page, reading
from fedtri.runs import compare, lifecycle
from fedtri.testing import laws
from processes import fork
from tiny import DEFAULTS, Lab

CONTRIBUTING = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text()


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A folder with the two files of the page in it, which is the current one."""
    method, test = re.findall(r"```python\n(.*?)```", CONTRIBUTING, re.DOTALL)
    (tmp_path / "my_method.py").write_text(method)
    (tmp_path / "test_my_method.py").write_text(test)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_it_runs_and_is_called_by_its_own_name(folder, lab: Lab):
    """Seen to fail with the run directory's name made of the whole path."""
    progress = list(lifecycle.run(lab.config(method="my_method.py:mine", rounds=2)))
    assert progress[-1].folder.name == "mine-1"
    assert reading.load(progress[-1].folder).method == "mine"


def test_it_appears_in_a_comparison_and_on_its_page(folder, lab: Lab):
    """Beside a method of the package. Seen to fail with names looked up in METHODS alone."""
    told = lab.config(rounds=1, steps=1).model_copy(update={"columns": config.Columns(**DEFAULTS["columns"])})
    Path("run.toml").write_text(config.dumps(told))
    planned = compare.plan(Path("run.toml"), ["fedit", "my_method.py:mine"], out=folder / "both")
    list(compare.run(planned))
    text = page.write(compare.finished(folder / "both"), folder / "page.html").read_text()
    assert "Mine" in text
    assert "FedIT" in text


def test_the_page_s_own_test_passes_and_a_broken_method_is_told_which_law(folder):
    """In a pytest of its own, as a stranger runs it. The broken one adds to the first reply's tensor in place."""
    assert "passed" in pytest_says(folder)
    source = Path("my_method.py").read_text()
    broken = source.replace(
        "        weights =", "        next(iter(replies[0].up.values())).add_(1.0)\n        weights ="
    )
    assert broken != source
    Path("my_method.py").write_text(broken)
    said = pytest_says(folder, "-k", "mutate")
    assert "mine breaks the law: aggregation does not mutate its inputs" in said


def pytest_says(folder: Path, *options: str) -> str:
    """What pytest prints, run in a process that has this one's libraries loaded but not the folder's modules."""
    for name in ("my_method", "test_my_method"):
        sys.modules.pop(name, None)
    run = lambda: sys.exit(pytest.main(["-q", "-x", "-p", "no:cacheprovider", "--rootdir=.", *options]))  # noqa: E731
    child = fork(folder / "said", run)
    child.wait(280)
    return child.output.read_text()


def test_an_installed_package_is_found_and_looked_for_once(folder, tmp_path, monkeypatch):
    """Where the path changes it is looked for again. Seen to fail without the cache, 0.1 s a name."""
    about = tmp_path / "site" / "theirs-1.0.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[fedtri.methods]\ntheir_method = my_method:mine\n")
    assert "their_method" not in lookup.names()
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.syspath_prepend(str(folder))
    asked = []
    look = lookup.entry_points
    monkeypatch.setattr(lookup, "entry_points", lambda **which: asked.append(which) or look(**which))
    assert lookup.names()[-1] == "their_method"
    assert lookup.make("their_method").name == "mine"
    assert lookup.find("fedit") is lookup.METHODS["fedit"]
    assert len(asked) == 1


@pytest.mark.parametrize("law", laws[:3], ids=str)
def test_a_law_takes_a_method_or_its_function(law, folder, tmp_path):
    mine = lookup.find(f"{folder}/my_method.py:mine")
    (tmp_path / "one").mkdir()
    (tmp_path / "other").mkdir()
    law.check(mine, tmp_path / "one")
    law.check(mine(keep_head=False), tmp_path / "other")
