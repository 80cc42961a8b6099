"""Laws of a real network: SuperLink, TLS, authenticated SuperNodes as processes of their own, killed and misled."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

import network
from fedtri import federation
from fedtri.store import ClientStore
from network import CLIENTS, Network, wait_for
from tiny import assert_same, clients_tensors, rounds

pytestmark = [pytest.mark.network, pytest.mark.xdist_group("network"), pytest.mark.timeout(400)]


@pytest.fixture(scope="session")
def net(lab, tmp_path_factory) -> Iterator[Network]:
    """One SuperLink and four SuperNodes for all tests."""
    net = Network(tmp_path_factory.mktemp("network") / "fed", lab)
    try:
        net.start_server()
        net.script("register")
        for client in CLIENTS:
            net.start_site(client)
        yield net
    finally:
        net.stop()


def assert_as_local(net: Network, out: Path, config, tmp_path: Path) -> None:
    """What every site holds is, bit for bit, what its client holds in one process that trains a client at a time."""
    data = network.together(net, tmp_path / "all.csv")
    built = federation.build(network.locally(config, data), ClientStore(tmp_path / "local"))
    list(rounds(built))
    assert_same(net.kept(out), clients_tensors(built))


@pytest.mark.parametrize("method", ["ce_lora", "fedit"])
def test_three_rounds_end_bit_for_bit_as_in_one_process(net, method, tmp_path):
    config = net.configuration(tmp_path / "run", method=method)
    out = net.run(config)
    lines = net.finished(out)
    assert [line["clients"] for line in lines] == [CLIENTS] * 3
    assert not any(line.get("failed") or line.get("refused") for line in lines)
    assert all(line["latency"].keys() == set(CLIENTS) for line in lines)
    assert_as_local(net, out, config, tmp_path)


def test_a_server_killed_in_mid_round_ends_as_one_never_stopped(net, tmp_path):
    """kill -9 of the SuperLink with its app while a client still trains; started again, it asks for that round again."""
    config = net.configuration(tmp_path / "run", method="ce_lora")
    out, late = net.run(config), CLIENTS[1]
    wait_for(lambda: len(network.lines(out)) == 1, 90, lambda: net.log(net.server))
    os.kill(net.worker(late), signal.SIGSTOP)
    asked = f"{CLIENTS[0]}: train, round 2"
    wait_for(lambda: asked in net.log(net.site(CLIENTS[0])), 60)
    net.kill("server")
    os.kill(net.worker(late), signal.SIGCONT)
    assert len(network.lines(out)) == 1
    net.start_server()
    net.run(config)
    assert [line["round"] for line in net.finished(out)] == [1, 2, 3]
    assert_as_local(net, out, config, tmp_path)
