"""The laws that every method must pass, each a function that raises AssertionError where a method breaks it."""

import copy
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fedtri.adapters import model as adapters
from fedtri.adapters.factors import effective_update
from fedtri.adapters.layout import Factors, Key
from fedtri.communication.in_process import LocalTransport
from fedtri.federation import client, loop, server
from fedtri.messages import Answer, Failure, Request
from fedtri.method import Method
from fedtri.metrics import ONCE
from fedtri.models import peft
from fedtri.models.loading import Weights
from fedtri.runs.simulation import Federation
from fedtri.state import ServerState
from fedtri.storage import checkpoint
from fedtri.testing.compare import assert_same
from fedtri.testing.world import World, rounds, tensors, trained


@dataclass(frozen=True)
class Law:
    """A law: what it says, and how a method is held to it."""

    name: str
    holds: Callable[[World], None]
    """Raises AssertionError where the world's method breaks it."""

    def check(self, method: Method | Callable[[], Method], folder: Path, **settings: Any) -> None:
        """Hold a method to this law.

        Args:
            method: The method, or the function that makes it.
            folder: An empty folder to work in, such as pytest's tmp_path.
            settings: Keys of a configuration that the method cannot do without, such as rank=8.

        Raises:
            AssertionError: Where the method breaks the law; the first line names both.
        """
        made = method if isinstance(method, Method) else method()
        try:
            self.holds(World(folder, made, settings))
        except AssertionError as error:
            raise AssertionError(f"{made.name} breaks the law: {self.name}. {error}") from error
        except Exception as error:
            error.add_note(f"This happened while {made.name} was held to the law: {self.name}.")
            raise

    def __str__(self) -> str:
        return self.name


def order(world: World) -> None:
    """Seen to fail with server_step passing replies on unsorted, and with a method that draws from the global RNG."""
    now = world.moment()
    expected = server.server_step(now.federation.method, now.state, now.replies)
    for replies in (now.replies[::-1], now.replies[2:] + now.replies[:2]):
        assert_same(server.server_step(now.federation.method, now.state, replies), expected, "the state")


def unmutated(world: World) -> None:
    """Seen to fail with means.mean accumulating into the first reply's own tensor."""
    now = world.moment()
    state, replies = copy.deepcopy((now.state, now.replies))
    server.server_step(now.federation.method, now.state, now.replies)
    assert_same(now.state, state, "the state")
    for reply, before in zip(now.replies, replies, strict=True):
        assert_same(reply.up, before.up, f"the reply of {reply.client}, up")


def identical(world: World) -> None:
    """Whatever the clients' sizes. Seen to fail with weights that sum to m / (m + 1), and with A and B weighted.

    Where what clients send arrives in the others' second adapter, it must arrive there as it was sent.
    """
    now = world.moment()
    built, first = now.federation, now.replies[0]
    site, mine = built.site, built.site.kept(first.client)
    replies = [replace(reply, up=first.up) for reply in now.replies]
    state = server.server_step(built.method, now.state, replies)
    plan = built.method.plan(now.state.round)
    if "a" in plan.down - plan.train:
        second = {Key(key.layer, key.factor.lower()): value for key, value in first.up.items() if key.factor in "AB"}
        mine = built.method.receive(mine, second, dict)
    for reply in replies:
        site.store.save(reply.client, mine, "same")
        down = server.downlink(built.method, state, reply.client)
        held = client.received(site, Request("evaluate", state.round, reply.client, down))
        for layer in built.spec.layout.layers:
            before, after = (_update(factors, layer.name, site.scales.of(first)) for factors in (mine, held))
            assert before.norm() > 0, f"{layer.name} has no update after a round"
            assert_same(after, before, f"ΔW of {reply.client}", atol=1e-9, rtol=1e-6)
        for key in built.spec.layout.keys(frozenset("PH")):
            torch.testing.assert_close(held[key], mine[key], atol=1e-9, rtol=1e-6)


def travels(world: World) -> None:
    """Seen to fail with a client that replies all it has, and with a line that counts the payload, not the buffer."""
    built = world.federation("travels", fraction=0.5)
    layout, plan, heard = built.spec.layout, built.method.plan, Listening(built.transport)
    for progress in loop.run(built.method, heard, built.spec.scales, replace(built.spec.schedule, rounds=3)):
        counted = sum(sum(table.values()) for table in progress.line["bytes"].values())
        assert counted == heard.encoded, f"{counted} bytes were counted, {heard.encoded} were encoded"
        for request, answer in heard.exchanged:
            assert isinstance(answer, Answer), f"the server refused a reply: {answer}"
            now = plan(request.round)
            upwards = {"train": now.up, "basis": frozenset("AB")}.get(request.phase, frozenset())
            assert set(answer.reply.up) == set(layout.keys(upwards)), request.phase
            downwards = layout.keys(frozenset() if request.phase in ONCE else now.down)
            assert set(request.down) <= set(downwards), request.phase
        heard.exchanged.clear()
        heard.encoded = 0


def moves(world: World) -> None:
    """Seen to fail with C left out of what the optimiser steps, and with a plan's frozen A let go.

    It notices the trap of a core between A and a frozen B = 0, whose gradient is zero for ever.
    """
    built = world.federation("moves")
    layout, plans = built.spec.layout, [built.method.plan(round) for round in range(4)]
    if plans[2:] == plans[:2]:
        plans = plans[:2]
    moved = set()
    for round, plan in enumerate(plans):
        before = tensors(built)
        trained(built, ServerState(round, scales=built.spec.scales))
        after, learns = tensors(built), set(layout.keys(plan.train))
        for name, own in before.items():
            changed = {key for key in own if not torch.equal(own[key], after[name][key])}
            assert changed <= learns, f"{_some(changed - learns)} changed, and the plan does not let it learn"
            moved |= changed
    still = set(layout.keys(frozenset().union(*(plan.train for plan in plans)))) - moved
    assert not still, f"{_some(still)} learns by the plan, and never moved"


def alive(world: World) -> None:
    """A row of A and the matching column of B that are both zero have gradients of zero for ever.

    With mixed ranks where the method takes them, and half of the clients. Seen to fail without `pairs.revive`
    (hetlora, flora_na) and with the noise of an SVD in place of zeros (flexlora).
    """
    rank = world.config().rank
    assert isinstance(rank, int)
    ranks = [1, rank, max(1, rank // 2), rank] if world.method.adapter.mixed_ranks else rank
    built = world.federation("alive", fraction=0.5, rounds=4, seed=1, rank=ranks)
    for progress in rounds(built):
        for name, own in tensors(built).items():
            for layer in built.spec.layout.layers:
                for first, second in ("AB", "ab"):
                    if (key := Key(layer.name, first)) in own:
                        A, B = own[key], own[Key(layer.name, second)]
                        sizes = torch.maximum(A.abs().amax(1), B.abs().amax(0))
                        dead = int((sizes < 1e-7 * sizes.max()).sum())
                        assert not dead, f"round {progress.round}: {name} has {dead} dead pairs in {layer.name}"


def executors(world: World) -> None:
    """Seen to fail with a loss that is the mean over the pooled batch of several clients, and with one norm clipped for
    all of them. With small passes and epochs of unequal length, against one client at a time in plain PyTorch, each
    asked alone as on a network: its local update sees no other."""
    common = {"steps": None, "epochs": 1.0, "batch_size": 8, "optimizer": {"clip": 0.05}, "partition": "dirichlet:0.5"}
    ways = {"together": {"group": 0, "token_budget": 60}, "alone": {"executor": "reference"}}
    found = {}
    for name, simulation in ways.items():
        built = world.federation(name, double=True, **common, simulation=simulation)
        transport = OneByOne(built.transport) if name == "alone" else built.transport
        ran = loop.run(built.method, transport, built.spec.scales, built.spec.schedule)
        found[name] = [(progress.state, progress.line) for progress in ran], tensors(built)
    (together, mine), (alone, reference) = found["together"], found["alone"]
    assert_same(mine, reference, "the clients' tensors", atol=1e-9, rtol=0.0)
    for (state, line), (expected, plain) in zip(together, alone, strict=True):
        assert_same(state, expected, "the state", atol=1e-9, rtol=0.0)
        assert abs(line["loss"] - plain["loss"]) <= 1e-5 * abs(plain["loss"]), "the training loss"
        assert line["accuracy"] == plain["accuracy"], "the accuracy"


def resumes(world: World) -> None:
    """Stopped in the middle of the second round. Seen to fail with seeds that leave out the round, and with `own` or
    `deliveries` missing from the checkpoint."""
    common = {"rounds": 3, "fraction": 0.5, "seed": 3, "evaluate": False}
    never = world.federation("never", **common)
    expected = list(rounds(never))[-1].state
    steps, running = itertools.count(), [False]

    def stop(*_: object) -> None:
        if running[0] and next(steps) == 1:
            raise KeyboardInterrupt

    stopped, where = world.federation("stopped", on_step=stop, **common), world.folder / "checkpoints"
    try:
        for progress in rounds(stopped):
            checkpoint.save(where, progress.state, stopped.site.store, progress.line)
            running[0] = True
    except KeyboardInterrupt:
        pass
    found = checkpoint.load(where, world.folder / "stopped")
    assert found is not None
    again = world.federation("stopped", found=found, **common)
    assert_same(list(rounds(again, found=found))[-1].state, expected, "the state")
    resumed, whole = (
        {name: saved.digest for name, saved in built.site.store.current.items()} for built in (again, never)
    )
    assert_same(resumed, whole, "the clients' files")


def exports(world: World) -> None:
    """As a PEFT adapter, and for a method that has none as merged weights. Seen to fail with B in place of B·C."""
    built = world.federation("exports")
    list(rounds(built))
    name, on, base = built.spec.clients[0], built.opened.adapted, str(world.model)
    own, rank, alpha = built.site.kept(name), built.spec.scales.ranks[name], built.spec.scales.alpha
    adapters.load(on, own, rank=rank, alpha=alpha)
    expected = _logits(built, on.model)
    plain = built.spec.recipe.load(base, built.spec.labels, Weights()).model
    if peft.unexportable(on.layout) is None:
        from peft import PeftModel

        folder = world.folder / "adapter"
        peft.write_peft(folder, own, on, alpha=alpha, base_model=base, task_type=built.spec.recipe.peft_type)
        found = PeftModel.from_pretrained(plain, str(folder))
    else:
        found = peft.merge(plain, own, on.layout, alpha / rank, on.kind)
    torch.testing.assert_close(_logits(built, found.eval()), expected, atol=1e-5, rtol=0)


laws: Sequence[Law] = (
    Law("the order of replies changes nothing", order),
    Law("aggregation does not mutate its inputs", unmutated),
    Law("identical replies aggregate to the same update", identical),
    Law("only the plan travels, and what is counted was encoded", travels),
    Law("every factor that learns moves, and no other", moves),
    Law("no aggregation leaves a pair of A and B that cannot learn", alive),
    Law("every executor gives a client the same result", executors),
    Law("a run that is stopped and resumed equals one that never was", resumes),
    Law("an exported adapter gives the client's own answers", exports),
)


class OneByOne:
    """A transport that asks one client after the other, as a network does."""

    def __init__(self, inner: LocalTransport) -> None:
        self.inner = inner

    def clients(self) -> list[str]:
        """See `Transport`."""
        return self.inner.clients()

    def exchange(self, requests: Sequence[Request]) -> list[Answer | Failure]:
        """See `Transport`."""
        return [answer for request in requests for answer in self.inner.exchange([request])]


class Listening:
    """A transport that notes what passes through it, and how many bytes that was."""

    def __init__(self, inner: LocalTransport) -> None:
        self.inner, self.encoded = inner, 0
        self.exchanged: list[tuple[Request, Answer | Failure]] = []

    def clients(self) -> list[str]:
        """See `Transport`."""
        return self.inner.clients()

    def exchange(self, requests: Sequence[Request]) -> list[Answer | Failure]:
        """See `Transport`."""
        down = [self.inner.codec.write_request(request) for request in requests]
        up = self.inner.serve([request.client for request in requests], down)
        self.encoded += sum(map(len, down)) + sum(map(len, up))
        answers = [self.inner.read(*one) for one in zip(requests, down, up, strict=True)]
        self.exchanged += zip(requests, answers, strict=True)
        return answers


def _update(factors: Factors, layer: str, scale: float) -> torch.Tensor:
    """ΔW of one client's layer, with its dense W."""
    return effective_update(factors, layer, scale) + factors.get(Key(layer, "W"), torch.zeros(()))


@torch.no_grad()
def _logits(built: Federation, model: nn.Module) -> torch.Tensor:
    """A model's answers to a client's test examples."""
    executor: Any = built.site.executor
    return executor.task.logits(model, executor.examples.batch(built.site.splits[built.spec.clients[0]].test))


def _some(keys: set[Key]) -> str:
    return ", ".join(f"{key.factor} of {key.layer}" for key in sorted(keys)[:3])
