"""Every method by name. A method is one file; its keyword-only options are what [method_options] may hold."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from fedtri.errors import FedtriError
from fedtri.methods.ce_lora import ce_lora
from fedtri.methods.fedit import fedit
from fedtri.methods.local import local
from fedtri.types import Method, Plan

METHODS: dict[str, Callable[..., Method]] = {"local": local, "fedit": fedit, "ce_lora": ce_lora}


def build(name: str, options: Mapping[str, Any] | None = None, head: str = "default") -> Method:
    """The method of this name with its options, and with the head personal or shared where `head` says so.

    Raises FedtriError for an unknown method or option, or an option's value out of range.
    """
    if name not in METHODS:
        raise FedtriError(f"method: unknown method {name!r}; expected one of {', '.join(METHODS)}")
    known = inspect.signature(METHODS[name]).parameters
    for option in options or {}:
        if option not in known:
            raise FedtriError(
                f"method_options.{option}: {name} has no such option; expected one of {', '.join(known) or '(none)'}"
            )
    return with_head(METHODS[name](**(options or {})), head)


def with_head(method: Method, head: str) -> Method:
    """The method with "H" travelling both ways ("shared"), staying home ("personal"), or as its paper has it."""
    if head == "default":
        return method

    def plan(round: int) -> Plan:
        own = method.plan(round)
        if head == "shared":
            return Plan(own.train, own.up | {"H"}, own.down | {"H"})
        return Plan(own.train, own.up - {"H"}, own.down - {"H"})

    return replace(method, plan=plan)
