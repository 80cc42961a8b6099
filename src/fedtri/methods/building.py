"""From a method's name and options to the method as a run uses it: its head, kind of adapter and server optimiser."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from fedtri.aggregation import means
from fedtri.aggregation.server_optimizers import ServerOptimizer
from fedtri.errors import FedtriError
from fedtri.messages import Reply
from fedtri.method import Aggregate, Method, Plan
from fedtri.methods import lookup
from fedtri.methods.table import METHODS
from fedtri.state import ServerState

AVERAGED = frozenset("HM")
"""What travels by its weighted mean whatever the method: the task head, and DoRA's magnitudes."""


def build(
    name: str,
    options: Mapping[str, Any] | None = None,
    *,
    head: str = "default",
    adapter: str = "lora",
    basis: str = "default",
    optimizer: ServerOptimizer | None = None,
    weights: str = "default",
) -> Method:
    """The method of this name with its options, for this kind of adapter, with this head, weights and server optimiser.

    Raises FedtriError as `lookup.make` and `as_run` do.
    """
    made = lookup.make(name, options)
    return as_run(made, head=head, adapter=adapter, basis=basis, optimizer=optimizer, weights=weights)


def as_run(
    method: Method,
    *,
    head: str = "default",
    adapter: str = "lora",
    basis: str = "default",
    optimizer: ServerOptimizer | None = None,
    weights: str = "default",
) -> Method:
    """The method as a run uses it.

    Args:
        method: The method as its function returned it.
        head: "shared": H travels both ways; "personal": it stays home; "default": as the method's paper has it.
        adapter: The kind of adapter: lora, dora or hira.
        basis: Where A, and B where it is a basis, come from; "default": as the method has it.
        optimizer: Follows the move of what the server shares.
        weights: "examples": a client counts by its number of examples; "uniform": all alike; "default": as the
            method's paper or its authors' code has it.

    Raises:
        FedtriError: For a kind of adapter or a basis that the method is not defined for, or a server optimiser where
            what is shared is no average.
    """
    method = with_basis(with_head(with_adapter(method, adapter), head), basis)
    if weights != "default":
        method = replace(method, weights=weights)
    method = replace(method, aggregate=_with_averages(method))
    return method if optimizer is None else with_optimizer(method, optimizer)


def with_adapter(method: Method, kind: str) -> Method:
    """The method for this kind of adapter: DoRA's magnitudes M learn, and travel where B does."""
    if kind not in method.adapter.kinds:
        able = ", ".join(name for name in METHODS if kind in METHODS[name]().adapter.kinds)
        raise FedtriError(f"adapter: {method.name} is not defined for {kind!r}; expected lora, or a method of {able}")
    if kind != "dora":
        return method

    def plan(round: int) -> Plan:
        own = method.plan(round)
        up, down = (kinds | ({"M"} if "B" in kinds else set()) for kinds in (own.up, own.down))
        return replace(own, train=own.train | {"M"}, up=up, down=down)

    return replace(method, plan=plan)


def with_head(method: Method, head: str) -> Method:
    """The method with "H" travelling both ways ("shared"), staying home ("personal"), or as its paper has it."""
    if head == "default":
        return method

    def plan(round: int) -> Plan:
        own = method.plan(round)
        if head == "shared":
            return replace(own, up=own.up | {"H"}, down=own.down | {"H"})
        return replace(own, up=own.up - {"H"}, down=own.down - {"H"})

    return replace(method, plan=plan)


def with_basis(method: Method, basis: str) -> Method:
    """The method with its A, and B where that is a basis, from there. A "gradient" basis comes down to the clients.

    Raises FedtriError for a basis that the method cannot use.
    """
    parts = method.adapter
    if basis not in ("default", *parts.bases):
        able = ", ".join(name for name in METHODS if basis in METHODS[name]().adapter.bases)
        own = f"expected default or {', '.join(parts.bases)}" if parts.bases else "it has no adapter"
        raise FedtriError(f"basis: {method.name} cannot use {basis!r}; {own}, or a method of {able}")
    parts = parts if basis == "default" else replace(parts, basis=basis)  # pyright: ignore[reportArgumentType]
    method = replace(method, adapter=parts)
    if parts.basis != "gradient":
        return method

    def plan(round: int) -> Plan:
        own = own_plan(round)
        return replace(own, down=own.down | parts.from_basis)

    own_plan = method.plan
    return replace(method, plan=plan)


def with_optimizer(method: Method, optimizer: ServerOptimizer) -> Method:
    """The method with a server optimiser. Raises FedtriError where what is shared is no average."""
    if not method.averages:
        able = ", ".join(name for name in METHODS if METHODS[name]().averages)
        raise FedtriError(f"server.optimizer: {method.name} shares no plain average; expected none, or one of {able}")
    return replace(method, aggregate=lambda state, replies: optimizer(state, method.aggregate(state, replies)))


def networked(method: Method) -> Method:
    """The method, for a real network. Raises FedtriError for one that needs everyone's data in one place."""
    if method.plan(0).pooled:
        raise FedtriError(f"method: {method.name} trains on everyone's data in one place; it exists in simulation only")
    return method


def scope(method: Method) -> str:
    """What a client ends with: "global" factors, the same for all, some that are "personal", or "both" side by side."""
    if method.adapter.personal_copy:
        return "both"
    plan = method.plan(0)
    # S is folded into C before it travels; a fresh A and B have gone into W
    home = plan.train - plan.down - {"S"} - (frozenset("AB") if "W" in plan.down else frozenset())
    return "personal" if home else "global"


def _with_averages(method: Method) -> Aggregate:
    """The method's aggregation of what is its own, and the mean of a head or magnitudes that travel.

    A head that the method has shared itself stays as it is. Here clients get their weights: replies that count alike
    hold one example each.
    """

    def aggregate(state: ServerState, replies: Sequence[Reply]) -> ServerState:
        up, replies = method.plan(state.round - 1).up, means.counted(replies, method.weights)
        if up - AVERAGED:
            state = method.aggregate(state, replies)
        shared = {key.factor for key, changed in state.deliveries.shared.items() if changed == state.round}
        if averaged := up & AVERAGED - shared:
            state = means.share(state, means.mean(replies, averaged))
        return state

    return aggregate
