"""The configuration of a run, and one-line errors for what is wrong in it."""

from fedtri.config.schema import (
    ClientName,
    Columns,
    Config,
    Network,
    Strict,
    dumps,
    load,
    parse_setting,
    read,
    validated,
)

__all__ = [
    "ClientName",
    "Columns",
    "Config",
    "Network",
    "Strict",
    "dumps",
    "load",
    "parse_setting",
    "read",
    "validated",
]
