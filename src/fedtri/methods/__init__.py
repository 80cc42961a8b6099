"""Every method by name. A method is one file; its keyword-only options are what [method_options] may hold."""

import difflib
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from fedtri.config.strict import checked_options
from fedtri.errors import FedtriError
from fedtri.method import Method, Plan
from fedtri.methods.ce_lora import ce_lora
from fedtri.methods.centralized import centralized
from fedtri.methods.ditto import ditto
from fedtri.methods.fed_sb import fed_sb
from fedtri.methods.fedex_lora import fedex_lora
from fedtri.methods.fedit import fedit
from fedtri.methods.fedprox import fedprox
from fedtri.methods.fedsa_lora import fedsa_lora
from fedtri.methods.ffa_lora import ffa_lora
from fedtri.methods.flexlora import flexlora
from fedtri.methods.flora import flora
from fedtri.methods.flora_na import flora_na
from fedtri.methods.full import full
from fedtri.methods.hetlora import hetlora
from fedtri.methods.local import local
from fedtri.methods.lora_fair import lora_fair
from fedtri.methods.pfedme import pfedme
from fedtri.methods.ravan import ravan
from fedtri.methods.rolora import rolora
from fedtri.state import ServerState

METHODS: dict[str, Callable[..., Method]] = {
    "local": local,
    "centralized": centralized,
    "full": full,
    "fedit": fedit,
    "fedprox": fedprox,
    "ffa_lora": ffa_lora,
    "fedsa_lora": fedsa_lora,
    "rolora": rolora,
    "flexlora": flexlora,
    "hetlora": hetlora,
    "flora": flora,
    "fedex_lora": fedex_lora,
    "lora_fair": lora_fair,
    "fed_sb": fed_sb,
    "ravan": ravan,
    "flora_na": flora_na,
    "ce_lora": ce_lora,
    "ditto": ditto,
    "pfedme": pfedme,
}


def build(name: str, options: Mapping[str, Any] | None = None, head: str = "default", adapter: str = "lora") -> Method:
    """The method of this name with its options, with the head personal or shared, for this kind of adapter.

    Raises FedtriError for an unknown method or option, an option's value out of range, or a kind of adapter that the
    method is not defined for.
    """
    if name not in METHODS:
        close = difflib.get_close_matches(name, METHODS, 1)
        hint = f"did you mean {close[0]}?" if close else f"expected one of {', '.join(METHODS)}"
        raise FedtriError(f"method: unknown method {name!r}; {hint}")
    method = METHODS[name](**checked_options(METHODS[name], options or {}, "method_options", name))
    return with_head(with_adapter(method, adapter), head)


def scope(method: Method) -> str:
    """What a client ends with: "global" factors, the same for all; some that are "personal"; or "both" side by side."""
    if method.personal is not None:
        return "both"
    plan = method.plan(0)
    # S is folded into C before it travels; a fresh A and B have gone into W
    home = plan.train - plan.down - {"S"} - (frozenset("AB") if method.fresh else frozenset())
    return "personal" if home else "global"


def with_adapter(method: Method, kind: str) -> Method:
    """The method for this kind of adapter: DoRA's magnitudes M learn, and travel where B does."""
    if kind not in method.adapters:
        able = ", ".join(name for name in METHODS if kind in METHODS[name]().adapters)
        raise FedtriError(f"adapter: {method.name} is not defined for {kind!r}; expected lora, or a method of {able}")
    if kind != "dora":
        return method

    def plan(round: int) -> Plan:
        own = method.plan(round)
        up, down = (kinds | ({"M"} if "B" in kinds else set()) for kinds in (own.up, own.down))
        return Plan(own.train | {"M"}, up, down)

    return replace(method, plan=plan)


def with_optimizer(method: Method, step: Callable[[ServerState, ServerState], ServerState]) -> Method:
    """The method with a server optimiser. Raises FedtriError where what is shared is no average."""
    if not method.server_optimizer:
        able = ", ".join(name for name in METHODS if METHODS[name]().server_optimizer)
        raise FedtriError(f"server.optimizer: {method.name} shares no plain average; expected none, or one of {able}")
    return replace(method, optimize=step)


def networked(method: Method) -> Method:
    """The method, for a real network. Raises FedtriError for one that needs everyone's data in one place."""
    if method.pooled:
        raise FedtriError(f"method: {method.name} trains on everyone's data in one place; it exists in simulation only")
    return method


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
