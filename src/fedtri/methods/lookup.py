"""Where a method's name leads: to a built-in method, to one of an installed package, or to a function in a file.

ce_lora              built in: `METHODS`
their_method         offered by an installed package under the entry-point group "fedtri.methods"
my_method.py:mine    the function `mine` of this file, from the current folder or an absolute path
"""

import difflib
import functools
import hashlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

from fedtri.config.strict import checked_options
from fedtri.errors import FedtriError
from fedtri.method import Method
from fedtri.methods.table import METHODS

GROUP = "fedtri.methods"
"""The entry-point group under which a package offers its methods."""

MakeMethod = Callable[..., Method]
"""A method's function: keyword-only options, each with a default, to the method."""


def names() -> list[str]:
    """The names of all built-in methods, then those of installed packages."""
    return [*METHODS, *sorted({point.name for point in _installed()} - set(METHODS))]


def is_file(name: str) -> bool:
    """Whether this is FILE.py:FUNCTION, not the name of a built-in or installed method."""
    return ":" in name or name.endswith(".py")


def refuse_file(name: str) -> None:
    """Raises FedtriError for a method that is a file: on a network, code does not travel to the sites."""
    if is_file(name):
        raise FedtriError(
            f"method: {name} is a file on one machine, and code does not travel to the sites; expected a built-in "
            f"method, or one of a package that every site has installed (entry-point group {GROUP})"
        )


def absolute(name: str) -> str:
    """The same method under a name that does not depend on the current folder."""
    file, colon, function = name.rpartition(":")
    return f"{Path(file).expanduser().resolve()}:{function}" if colon else name


def find(name: str) -> MakeMethod:
    """The function of the method with this name.

    Raises FedtriError in one line where there is no such method, file or function, where the file cannot be imported,
    or where two packages offer the same name.
    """
    if is_file(name):
        return _checked(name, _in_file(name))
    offered = [point for point in _installed() if point.name == name]
    if name in METHODS and not offered:
        return METHODS[name]
    if not offered:
        known = names()
        close = difflib.get_close_matches(name, known, 1)
        hint = f"did you mean {close[0]}?" if close else f"expected one of {', '.join(known)}, or FILE.py:FUNCTION"
        raise FedtriError(f"method: unknown method {name!r}; {hint}")
    if name in METHODS or len(offered) > 1:
        from_where = [_package(point) for point in offered] + ["fedtri itself"] * (name in METHODS)
        raise FedtriError(
            f"method: {name!r} is offered by {' and by '.join(from_where)}; expected one of that name; "
            "uninstall the other, or give FILE.py:FUNCTION"
        )
    try:
        return _checked(name, offered[0].load())
    except FedtriError:
        raise
    except Exception as error:
        raise FedtriError(f"method: {name} of {_package(offered[0])}: {_where(error)}") from error


def make(name: str, options: Mapping[str, Any] | None = None) -> Method:
    """The method of this name with its options.

    Raises FedtriError as `find` does, for an option that is unknown or out of range, and where the function fails,
    returns no Method, or gives it a name that is taken or is no name.
    """
    function = find(name)
    checked = checked_options(function, options or {}, "method_options", name)
    try:
        method = function(**checked)
    except FedtriError:
        raise
    except Exception as error:
        raise FedtriError(f"method: {name}: {_where(error)}") from error
    if not isinstance(method, Method):
        raise FedtriError(f"method: {name} returned {type(method).__name__}, expected a fedtri.Method")
    if name not in METHODS and method.name in METHODS:
        raise FedtriError(
            f"method: {name} calls itself {method.name!r}, as a built-in method does; give it another name"
        )
    if not method.name.isidentifier():
        raise FedtriError(
            f"method: {name} calls itself {method.name!r}; expected letters, digits and underscores, as folders of "
            "runs are called after it"
        )
    return method


def _installed() -> Sequence[EntryPoint]:
    return _offered(tuple(sys.path))


@functools.cache
def _offered(path: tuple[str, ...]) -> Sequence[EntryPoint]:
    """The entry points of the packages on this path: to look through them takes 0.1 s."""
    return list(entry_points(group=GROUP))


def _package(point: EntryPoint) -> str:
    return f"package {point.dist.name}" if point.dist is not None else point.value


def _in_file(name: str) -> object:
    file, colon, function = name.rpartition(":")
    path = Path(file).expanduser().resolve()
    if not (colon and file and function):
        raise FedtriError(f"method: {name!r}: expected FILE.py:FUNCTION, such as my_method.py:mine")
    if not path.is_file():
        raise FedtriError(f"method: {name}: there is no file {path}; give its path from the current folder")
    module = _imported(path, path.stat().st_mtime_ns)
    if not hasattr(module, function):
        own = [n for n, one in vars(module).items() if inspect.isfunction(one) and one.__module__ == module.__name__]
        has = f"it has {', '.join(own)}" if own else "it has none"
        raise FedtriError(f"method: {file} has no function {function!r}; {has}")
    return getattr(module, function)


@functools.cache
def _imported(path: Path, changed: int) -> ModuleType:
    """The file as a module, imported once for each state it is found in."""
    name = f"{path.stem}_{hashlib.sha256(f'{path} {changed}'.encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise FedtriError(f"method: {path}: is no Python file; expected FILE.py:FUNCTION")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # as `import` does it: dataclasses look their module up there
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise FedtriError(f"method: {_where(error, path)}") from error
    return module


def _where(error: Exception, path: Path | None = None) -> str:
    """FILE:LINE: what went wrong; of `path`, or where it happened."""
    if isinstance(error, SyntaxError):
        return f"{error.filename}:{error.lineno}: {error.msg}"
    frames = traceback.extract_tb(error.__traceback__)
    mine = [frame for frame in frames if path is not None and frame.filename == str(path)] or frames
    said = str(error).strip().splitlines()
    return f"{mine[-1].filename}:{mine[-1].lineno}: {type(error).__name__}{f': {said[0]}' if said else ''}"


def _checked(name: str, function: object) -> MakeMethod:
    """The function, where all of its options have a name and a default."""
    if not callable(function):
        raise FedtriError(f"method: {name} is a {type(function).__name__}, expected a function that returns a Method")
    for option in inspect.signature(function).parameters.values():
        if option.kind in (option.VAR_POSITIONAL, option.VAR_KEYWORD, option.POSITIONAL_ONLY):
            raise FedtriError(f"method: {name}: expected options with names, got {option}")
        if option.default is option.empty:
            raise FedtriError(f"method: {name}: option {option.name!r} has no default; give it one")
    return function  # pyright: ignore[reportReturnType]
