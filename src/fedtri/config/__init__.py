"""The configuration of a run, and one-line errors for what is wrong in it."""

from fedtri.config.schema import (
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

__all__ = ["Columns", "Config", "Network", "Strict", "dumps", "load", "parse_setting", "read", "validated"]
