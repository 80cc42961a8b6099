"""Every method: one file each. `METHODS` lists them by name, `build` makes one as a run uses it."""

from fedtri.methods.building import build, networked, scope, with_adapter, with_head, with_optimizer
from fedtri.methods.table import METHODS

__all__ = ["METHODS", "build", "networked", "scope", "with_adapter", "with_head", "with_optimizer"]
