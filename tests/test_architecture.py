"""What the design promises of imports and dependencies, beside the layers that import-linter checks in `make check`."""

import ast
import functools
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import fedtri
from fedtri.methods import METHODS

ROOT = Path(fedtri.__file__).parent
PROJECT = Path(__file__).parents[1] / "pyproject.toml"
FILES = sorted(ROOT.rglob("*.py"))
HEAVY = ("torch", "transformers", "sklearn", "ot", "datasets", "peft", "flwr")


@functools.cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def imported(path: Path) -> Iterator[str]:
    """Every module a file imports anywhere, with the names taken from it."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def is_of(module: str, packages: tuple[str, ...]) -> bool:
    return module.split(".")[0] in packages


LIGHT = ("fedtri", "fedtri.cli.main", "fedtri.storage.run_directory", "fedtri.report.page")


def test_what_needs_no_model_loads_no_model_library():
    """`fedtri --help` and the report answer at once; seen to fail (6 s) with torch imported at the top of cli."""
    code = f"import sys\nfor module in {LIGHT}: __import__(module); print(module, *set({HEAVY}) & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == list(LIGHT)


def test_flower_is_imported_by_its_transport_alone():
    """And by its app, which lives under deploy/."""
    users = {str(path.relative_to(ROOT)) for path in FILES if any(is_of(m, ("flwr",)) for m in imported(path))}
    assert users
    assert all(name.startswith("communication/flower") for name in users)


def plain(distribution: str) -> str:
    """A distribution's name as package indexes compare them."""
    return re.sub(r"[-_.]+", "-", distribution).lower()


def third_party(path: Path) -> Iterator[str]:
    """The top-level modules of other projects that a file imports, `import_module("...")` included."""
    names = set(imported(path))
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "import_module":
            names |= {arg.value for arg in node.args if isinstance(arg, ast.Constant)}
    tops = {name.split(".")[0] for name in names}
    yield from sorted(tops - set(sys.stdlib_module_names) - {"fedtri"})


def test_what_is_imported_is_declared():
    """In the dependencies or an extra of pyproject.toml; seen to fail for cryptography, httpx, pyarrow and jinja2."""
    project = tomllib.loads(PROJECT.read_text())["project"]
    extras = [asked for name, asked in project["optional-dependencies"].items() if name != "dev"]
    declared = {plain(re.split(r"[^\w.-]", one)[0]) for asked in (project["dependencies"], *extras) for one in asked}
    owners = packages_distributions()
    for path in FILES:
        for module in third_party(path):
            owned = {plain(owner) for owner in owners.get(module, [module])}
            assert declared & owned, f"{path}: {module} is not declared"


def test_shapes_are_checked_in_every_file_that_has_some():
    """By jaxtyping, in the tests. Of other files it would check what pyright checks, at twice the tests' time."""
    options = tomllib.loads(PROJECT.read_text())["tool"]["pytest"]["ini_options"]["addopts"]
    (given,) = re.findall(r"--jaxtyping-packages=(\S+)", options)
    for path in FILES:
        if any(is_of(module, ("jaxtyping",)) for module in imported(path)):
            module = ".".join(["fedtri", *path.relative_to(ROOT).with_suffix("").parts])
            assert any(f"{module}.".startswith(f"{one}.") for one in given.split(",")), module


def test_the_report_imports_no_torch():
    for path in (ROOT / "report").rglob("*.py"):
        assert not any(is_of(module, ("torch", "transformers")) for module in imported(path)), path


def test_nothing_is_ever_unpickled():
    for path in FILES:
        modules = set(imported(path))
        assert not any(is_of(module, ("pickle", "dill", "cloudpickle", "joblib", "shelve")) for module in modules), path
        calls = [ast.unparse(node.func) for node in ast.walk(tree(path)) if isinstance(node, ast.Call)]
        assert not {"torch.load", "torch.save", "eval", "exec"} & set(calls), path
        if any(module.startswith("multiprocessing.connection") for module in modules):
            # a connection's send and recv pickle; send_bytes and recv_bytes do not
            assert not [call for call in calls if call.endswith((".send", ".recv"))], path


def test_no_global_random_numbers():
    """Whatever is random takes a seed or a generator."""
    for path in FILES:
        calls = {ast.unparse(node.func) for node in ast.walk(tree(path)) if isinstance(node, ast.Call)}
        legacy = {name for name in calls if name.startswith("np.random.") and "default_rng" not in name}
        assert not legacy | (calls & {"torch.manual_seed", "random.seed", "random.random", "random.shuffle"}), path


ABOUT_METHODS = {"building", "lookup", "table"}
"""The files of methods/ that are not a method."""


def test_a_method_is_one_file_of_its_own_name_that_imports_no_other():
    paths = [path for path in (ROOT / "methods").glob("[!_]*.py") if path.stem not in ABOUT_METHODS]
    assert {path.stem for path in paths} == set(METHODS)
    for path in paths:
        assert METHODS[path.stem].__module__ == f"fedtri.methods.{path.stem}"
        assert not any(module.startswith("fedtri.methods") for module in imported(path)), path


def test_a_module_opens_with_what_it_does():
    for path in FILES:
        said = ast.get_docstring(tree(path))
        assert said, path
        assert said.splitlines()[0].rstrip().endswith((".", "?", ":")), path
