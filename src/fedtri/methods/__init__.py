"""Every method: one file each. `METHODS` has the built-in ones by name, `build` makes any one as a run uses it."""

from fedtri.methods.building import as_run, build, networked, scope
from fedtri.methods.lookup import absolute, find, is_file, make, names, refuse_file
from fedtri.methods.table import METHODS

__all__ = [
    "METHODS",
    "absolute",
    "as_run",
    "build",
    "find",
    "is_file",
    "make",
    "names",
    "networked",
    "refuse_file",
    "scope",
]
