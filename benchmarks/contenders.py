"""One round of the same federated work, by fedtri, by Flower's simulation with PEFT, and by PEFT in a plain loop.

FedIT: every client trains LoRA and the head from the shared ones, the server takes their mean weighted by examples.
Each function is a generator: `next` trains one round and gives its mean training loss over clients and steps. Texts
are tokenised and dealt once (`prepare`), and all three take the same minibatches in the same order from the same start.
"""

import functools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Work:
    """A round's work; the defaults are the reference work but for where its data lie."""

    data: str
    folder: str
    """Where `prepare` leaves what the contenders share, and where fedtri runs."""
    model: str = "minilm"
    clients: int = 10
    steps: int = 10
    batch_size: int = 16
    rank: int = 8
    max_length: int = 128
    learning_rate: float = 1e-3
    layers: str = "all"
    limit: int | None = None
    """How many texts of the data take part; None: all."""
    threads: int = 2
    mixed: bool = False
    """Products in bfloat16: fedtri's model_options.mixed_precision, PyTorch's autocast for the others."""

    @property
    def alpha(self) -> float:
        """LoRA's alpha: twice the rank."""
        return 2.0 * self.rank


def config_of(work: Work, **more: Any) -> Any:
    """fedtri's configuration of this work, without evaluation, for ever."""
    from fedtri import config

    return config.validated({
        "model": work.model, "data": work.data, "method": "fedit", "head": "shared", "clients": work.clients,
        "partition": "iid", "steps": work.steps, "batch_size": work.batch_size, "rank": work.rank,
        "lora_alpha": work.alpha, "max_length": work.max_length, "learning_rate": work.learning_rate,
        "rounds": 10**6, "evaluate": False, "device": "cpu", "seed": 0, "layers": work.layers,
        "data_options": {} if work.limit is None else {"limit": work.limit},
        "model_options": {"mixed_precision": "bfloat16"} if work.mixed else {}, **more,
    })  # fmt: skip


def prepare(work: Work) -> list[int]:
    """Write what the other two contenders start from; returns the real tokens of each of the first rounds."""
    import safetensors.torch

    from fedtri.adapters.layout import key_name
    from fedtri.execution.executor import minibatches
    from fedtri.runs.simulation import build
    from fedtri.seeds import derive
    from fedtri.storage.client_store import ClientStore

    built = build(config_of(work), ClientStore(Path(work.folder) / "prepared"))
    site, clients = built.site, built.transport.clients()
    executor: Any = site.executor
    examples = executor.examples

    def batches(client: str, round: int) -> list[np.ndarray]:
        seed = derive(site.seed, "batches", round, client)
        return list(minibatches(site.splits[client].train, site.optimization, seed))

    rounds = [[batches(client, round) for client in clients] for round in range(ROUNDS)]
    used = np.unique(np.concatenate([rows for clients_ in rounds for steps in clients_ for rows in steps]))
    place = {int(row): index for index, row in enumerate(used)}
    tokens = [examples.tokens.values[examples.tokens.offsets[row] : examples.tokens.offsets[row + 1]] for row in used]
    np.savez(
        Path(work.folder) / "texts.npz", values=np.concatenate(tokens), labels=examples.labels[used],
        ends=np.cumsum([0, *map(len, tokens)]),
    )  # fmt: skip
    order = [[[[place[int(row)] for row in rows] for rows in steps] for steps in clients_] for clients_ in rounds]
    layers = [layer.name for layer in built.spec.layout.layers]
    sizes = [len(site.splits[c].train) for c in clients]
    about = {"order": order, "layers": layers, "sizes": sizes, "pad": examples.pad, "classes": len(built.spec.labels)}
    (Path(work.folder) / "work.json").write_text(json.dumps(about))
    start = {key_name(key): value for key, value in site.initial(clients[0]).items() if key.factor in "ABH"}
    safetensors.torch.save_file(
        {name: value.float().contiguous() for name, value in start.items()}, Path(work.folder) / "start.safetensors"
    )
    return [int(sum(examples.lengths[rows].sum() for steps in clients_ for rows in steps)) for clients_ in rounds]


ROUNDS = 20
"""For how many rounds `prepare` lays out the minibatches."""


def fedtri_rounds(work: Work, **more: Any) -> Iterator[float]:
    """Whole rounds of `fedtri run`, run directory, wire format and checkpoints included."""
    import torch

    from fedtri.runs import lifecycle

    torch.set_num_threads(work.threads)
    folder = Path(work.folder) / ("run-bfloat16" if work.mixed else "run")
    for progress in lifecycle.run(config_of(work, out=str(folder), **more)):
        yield progress.line["loss"]


class Peers:
    """PEFT's LoRA on a Hugging Face model, and the local training of one client as its users write it."""

    def __init__(self, work: Work) -> None:
        import safetensors.torch
        import torch
        from peft import LoraConfig, TaskType, get_peft_model
        from transformers import AutoModelForSequenceClassification

        from fedtri.models.loading import locate
        from fedtri.tasks.checkpoints import quiet

        folder = Path(work.folder)
        self.work = work
        self.about = json.loads((folder / "work.json").read_text())
        texts = np.load(folder / "texts.npz")
        self.values, self.ends, self.labels = texts["values"], texts["ends"], texts["labels"]
        # dropout off as in fedtri, so that the losses can be compared
        with quiet():
            model = AutoModelForSequenceClassification.from_pretrained(
                locate(work.model), num_labels=self.about["classes"], hidden_dropout_prob=0.0,
                attention_probs_dropout_prob=0.0,
            )  # fmt: skip
        config = LoraConfig(
            task_type=TaskType.SEQ_CLS, r=work.rank, lora_alpha=int(work.alpha), lora_dropout=0.0,
            target_modules=self.about["layers"], modules_to_save=["classifier"],
        )  # fmt: skip
        self.model: Any = get_peft_model(model, config)
        self.learns = {name: value for name, value in self.model.named_parameters() if value.requires_grad}
        start = safetensors.torch.load_file(folder / "start.safetensors")
        self.start = {name: torch.empty_like(value) for name, value in self.learns.items()}
        for name, value in start.items():
            self.start[peft_name(name, self.learns)].copy_(value)

    def batch(self, rows: Sequence[int]) -> dict[str, Any]:
        """Padded to the longest of the batch."""
        import torch

        texts = [self.values[self.ends[row] : self.ends[row + 1]] for row in rows]
        longest = max(map(len, texts))
        ids = np.full((len(rows), longest), self.about["pad"])
        for row, text in enumerate(texts):
            ids[row, : len(text)] = text
        mask = np.arange(longest) < np.array([[len(text)] for text in texts])
        return {
            "input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask.astype(np.int64)),
            "labels": torch.from_numpy(self.labels[list(rows)]),
        }  # fmt: skip

    def train(self, client: int, round: int, received: Mapping[str, Any]) -> tuple[dict[str, Any], float]:
        """One client's round: what it learned, and its mean loss."""
        import torch

        with torch.no_grad():
            for name, value in received.items():
                self.learns[name].copy_(value)
        optimizer = torch.optim.AdamW(self.learns.values(), lr=self.work.learning_rate, weight_decay=0.0)
        losses = []
        self.model.train()
        for rows in self.about["order"][round][client]:
            with torch.autocast("cpu", torch.bfloat16, enabled=self.work.mixed):
                loss = self.model(**self.batch(rows)).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.learns.values(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return {name: value.detach().clone() for name, value in self.learns.items()}, sum(losses) / len(losses)


def peft_name(name: str, learns: Mapping[str, Any]) -> str:
    """PEFT's name of a tensor that fedtri calls `name`."""
    from fedtri.adapters.layout import parse_key

    key = parse_key(name)
    layer, part = key.layer.rsplit(".", 1) if key.factor == "H" else (key.layer, f"lora_{key.factor}")
    (found,) = (n for n in learns if f".{layer}." in n and f".{part}" in n)
    return found


def peft_rounds(work: Work) -> Iterator[float]:
    """Clients one after the other through one PEFT model on all threads."""
    import torch

    torch.set_num_threads(work.threads)
    peers = Peers(work)
    sizes, shared = peers.about["sizes"], peers.start
    for round in range(ROUNDS):
        replies = [peers.train(client, round, shared) for client in range(work.clients)]
        shared = {
            name: sum(size * reply[name] for size, (reply, _) in zip(sizes, replies, strict=True)) / sum(sizes)
            for name in shared
        }
        yield sum(loss for _, loss in replies) / len(replies)


@functools.cache
def peers_of(table: str) -> Peers:
    """An actor's model, kept between its rounds as Flower's users do."""
    return Peers(Work(**json.loads(table)))


def flower_rounds(work: Work, say: Callable[[float], None], wait: Callable[[], bool]) -> None:
    """Flower's simulation engine (Ray), one core a client so that all cores are busy; FedAvg as it comes.

    Flower owns the loop, so this is no generator: `say(loss)` after each round, and `wait()` before each says whether
    to go on.
    """
    from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
    from flwr.clientapp import ClientApp
    from flwr.serverapp import Grid, ServerApp
    from flwr.serverapp.strategy import FedAvg
    from flwr.simulation import run_simulation

    client_app, server_app, table = ClientApp(), ServerApp(), json.dumps(asdict(work))

    @client_app.train()
    def _train(message: Message, context: Context) -> Message:
        import torch

        torch.set_num_threads(1)
        client, peers = int(context.node_config["partition-id"]), peers_of(table)
        received = message.content["arrays"].to_torch_state_dict()
        learned, loss = peers.train(client, int(message.content["config"]["server-round"]) - 1, received)
        metrics = MetricRecord({"loss": loss, "client": client, "num-examples": peers.about["sizes"][client]})
        return Message(RecordDict({"arrays": ArrayRecord(learned), "metrics": metrics}), reply_to=message)

    @server_app.main()
    def _main(grid: Grid, context: Context) -> None:
        arrays = ArrayRecord(Peers(work).start)
        strategy = FedAvg(fraction_evaluate=0.0, min_available_nodes=work.clients)
        for round in range(1, ROUNDS + 1):
            if not wait():
                return
            messages = strategy.configure_train(round, arrays, ConfigRecord(), grid)
            replies = list(grid.send_and_receive(messages))
            found, _ = strategy.aggregate_train(round, replies)
            assert found is not None
            arrays = found
            say(sum(float(reply.content["metrics"]["loss"]) for reply in replies) / len(replies))

    run_simulation(
        server_app, client_app, num_supernodes=work.clients,
        backend_config={"client_resources": {"num_cpus": 1}, "init_args": {"num_cpus": work.threads}},
    )  # fmt: skip
