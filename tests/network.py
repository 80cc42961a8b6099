"""A federation of real processes on loopback: one SuperLink with TLS and node authentication, and its SuperNodes."""

import csv
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tomli_w

from fedtri import config as configuration
from fedtri.adapters.layout import Factors
from fedtri.config import Config
from fedtri.deploy import folder as deployment
from fedtri.deploy.journal import Journal
from tiny import LABELS, Lab, save_data

CLIENTS = [f"client-{number:02}" for number in range(4)]
ROWS = 40
PLANTED = "planted7391"
"""A word in every text of every site, which must reach no other place."""
SCRIPTS = str(Path(sys.executable).parent)
ENVIRONMENT = {**os.environ, "PATH": f"{SCRIPTS}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
SUPERNODE = f"""#!{sys.executable}
# The real SuperNode, which looks for messages every 0.2 s instead of 3, and is missed after 20 s instead of 60.
import sys, time, types
from flwr.supercore import heartbeat
from flwr.supernode import fleet_http_connection, start_client_internal
from flwr.supernode.cli import flower_supernode
heartbeat.HEARTBEAT_DEFAULT_INTERVAL = fleet_http_connection.HEARTBEAT_DEFAULT_INTERVAL = 10
start_client_internal.time = types.SimpleNamespace(sleep=lambda seconds: time.sleep(0.2))
sys.exit(flower_supernode())
"""


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def wait_for(what: Callable[[], Any], seconds: float, why: Callable[[], str] = lambda: "") -> Any:
    """The first true value; fails after `seconds`."""
    until = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < until, f"not within {seconds:g} s: {why()}"
        time.sleep(0.05)
    return found


def kill_tree(process: int) -> None:
    """kill -9 of a process and of all that it has started."""
    parents: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            number, rest = stat.read_text().split(" ", 1)
        except OSError:
            continue
        parents.setdefault(int(rest.rpartition(")")[2].split()[1]), []).append(int(number))
    doomed = [process]
    for one in doomed:
        doomed += parents.get(one, [])
    for one in doomed:
        with suppress(ProcessLookupError):
            os.kill(one, signal.SIGKILL)


@dataclass
class Network:
    """What `fedtri deploy init` writes, started."""

    folder: Path
    lab: Lab
    port: int = field(default_factory=free_port)
    processes: dict[str, subprocess.Popen] = field(default_factory=dict)
    runs: dict[Path, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        deployment.write(self.folder, clients=CLIENTS, labels=sorted(LABELS), host="127.0.0.1", port=self.port)
        (self.folder / "bin").mkdir()
        (self.folder / "bin" / "flower-supernode").write_text(SUPERNODE)
        (self.folder / "bin" / "flower-supernode").chmod(0o755)
        for number, client in enumerate(CLIENTS):
            head, *rows = save_data(self.site(client) / "data.csv", ROWS, seed=number).read_text().splitlines()
            (self.site(client) / "data.csv").write_text("\n".join([head, *(f"{PLANTED} {row}" for row in rows)]))
            columns = '\n[columns]\ntext = "sentence"\nlabel = "topic"\n'
            (self.site(client) / "node.toml").write_text((self.site(client) / "node.toml").read_text() + columns)

    @property
    def server(self) -> Path:
        return self.folder / "server"

    def site(self, client: str) -> Path:
        return self.folder / "sites" / client

    def start(self, name: str, folder: Path, **environment: str) -> None:
        """Run the folder's start script and leave it running; what it says is appended to log."""
        with (folder / "log").open("a") as log:
            self.processes[name] = subprocess.Popen(
                [folder / "start"], stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
                env={**ENVIRONMENT, "PATH": f"{self.folder}/bin:{ENVIRONMENT['PATH']}", **environment},
            )  # fmt: skip

    def start_server(self) -> None:
        self.start("server", self.server, HOST="127.0.0.1")
        wait_for(self.answering, 60, lambda: self.log(self.server))

    def start_sites(self, *clients: str) -> None:
        """Start SuperNodes until the server takes them, which for one that was killed it does once it misses it."""
        until, joined = time.monotonic() + 90, lambda client: self.log(self.site(client)).count("SuperNode ID")
        waiting = {client: joined(client) for client in clients}
        while waiting := {client: seen for client, seen in waiting.items() if joined(client) == seen}:
            assert time.monotonic() < until, self.log(self.site(min(waiting)))
            for client in waiting:
                if client not in self.processes or self.processes[client].poll() is not None:
                    self.start(client, self.site(client), PORT=str(free_port()))
            time.sleep(0.1)

    def warm(self, client: str) -> None:
        """Start the process that will hold the site's model before it is asked for."""
        (self.site(client) / "state").mkdir(mode=0o700, exist_ok=True)
        command = [sys.executable, "-m", "fedtri.deploy.worker", "state", "900"]
        with (self.site(client) / "log").open("a") as log:
            subprocess.Popen(
                command, cwd=self.site(client), start_new_session=True, stdout=log, stderr=log, env=ENVIRONMENT
            )

    def answering(self) -> bool:
        with socket.socket() as one:
            return one.connect_ex(("127.0.0.1", self.port)) == 0

    def log(self, folder: Path) -> str:
        path = folder / "log"
        return path.read_text(errors="replace") if path.exists() else ""

    def script(self, name: str, *arguments: str) -> str:
        """One of the server's scripts, run to its end."""
        done = subprocess.run(
            [self.server / name, *arguments], capture_output=True, text=True, env=ENVIRONMENT, timeout=120
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def kill(self, name: str) -> None:
        """kill -9 of the server or a site, and of all processes that it has started."""
        if (self.site(name) / "state").exists() and (worker := self.worker(name)):
            kill_tree(worker)
        kill_tree(self.processes[name].pid)
        self.processes.pop(name).wait()

    def worker(self, client: str) -> int | None:
        """The process that holds the site's model."""
        path = self.site(client) / "state" / "worker.json"
        number = json.loads(path.read_text())["process"] if path.exists() else None
        return number if number and Path(f"/proc/{number}").exists() else None

    def configuration(self, out: Path, **values: Any) -> Config:
        """A configuration for both ends."""
        network = {"clients": CLIENTS, "labels": sorted(LABELS), "minimum": 4, "deadline": 120.0, "patience": 60.0}
        network |= values.pop("network", {})
        values = {"rounds": 3, "evaluate": False} | values
        return self.lab.config(out=str(out), network=network, clients=None, **values)

    def run(self, config: Config) -> Path:
        """Start a run of this configuration; its run directory."""
        table = config.model_dump(exclude_none=True)
        (self.server / "app" / "federation.toml").write_text(tomli_w.dumps(table))
        (number,) = re.findall(r"started run (\d+)", self.script("run"))
        self.runs[Path(str(config.out))] = number
        return Path(str(config.out))

    def stop_runs(self) -> None:
        """Stop what a test that failed has left running."""
        for out, number in self.runs.items():
            if not (out / "report.html").exists():
                command = f". ./environment; flwr stop {number} fedtri"
                subprocess.run(["sh", "-c", command], cwd=self.server, env=ENVIRONMENT, capture_output=True)
        self.runs.clear()

    def finished(self, out: Path, seconds: float = 300) -> list[dict[str, Any]]:
        """The lines of a run, once it is finished."""
        said = lambda: (out / "run.log").read_text() if (out / "run.log").exists() else self.log(self.server)  # noqa: E731
        wait_for(lambda: (out / "report.html").exists() or "the run stopped" in said(), seconds, said)
        assert "the run stopped" not in said(), said()
        return lines(out)

    def kept(self, out: Path) -> dict[str, Factors]:
        """What each site holds on its own disk after this run."""
        number = json.loads((out / "network.json").read_text())["run"]
        found = {}
        for client in CLIENTS:
            mine = Journal(self.site(client) / "state" / "runs" / number).newest().load(client)
            assert mine is not None, client
            found[client] = mine
        return found

    def stop(self) -> None:
        for name in list(self.processes):
            self.kill(name)


def lines(out: Path) -> list[dict[str, Any]]:
    """What rounds.jsonl holds so far."""
    path = out / "rounds.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def trained(line: Mapping[str, Any]) -> set[str]:
    """The clients whose training went into a round; after the last one clients answer once more, if only to receive."""
    return {client for client, phases in line["latency"].items() if "train" in phases}


def together(net: Network, path: Path) -> Path:
    """All sites' examples in one file, with the site in a column, for the local transport."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["sentence", "topic", "site"])
        for client in CLIENTS:
            with (net.site(client) / "data.csv").open(newline="") as own:
                writer.writerows([*row, client] for row in list(csv.reader(own))[1:])
    return path


def locally(config: Config, data: Path) -> Config:
    """The same run in one process, a client at a time."""
    table: Mapping[str, Any] = config.model_dump(exclude_none=True)
    own = {"data": str(data), "partition": "natural:site", "simulation": {"group": 1}}
    return configuration.validated({**table, **own})
