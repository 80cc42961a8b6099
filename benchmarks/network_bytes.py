"""Bytes on the wire per client and round: CE-LoRA as fedtri sends it, and LoRA as users of Flower and PEFT do.

    python benchmarks/network_bytes.py [--out docs/results/network_bytes.md]

MiniLM, rank 8, one client's settled round. A message's body is all that Flower moves of its content: the
bytes of the message's objects, as the SuperLink stores and sends them. What HTTP, TLS and polling add is left out.
"""

import argparse
import tempfile
from pathlib import Path

import peft
import tomli_w
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.task_identity import TaskIdentity
from transformers import AutoModelForSequenceClassification

from fedtri.adapters.layout import Factors
from fedtri.communication.flower_calls import BODY, PREFIX, Called
from fedtri.communication.numbers import payload_bytes
from fedtri.deploy import site
from fedtri.messages import Request
from fedtri.metrics import Phase
from fedtri.models.loading import locate

CLIENT, RUN = "site1", bytes(8)


def body(content: RecordDict) -> int:
    """Bytes of the content's objects as Flower sends them."""
    message = Message(content, dst_node_id=1, message_type="train")
    objects = get_all_nested_objects(message)
    return sum(len(one.deflate()) for one in objects.values())


def buffer(data: bytes) -> int:
    """Bytes of a message that holds one buffer."""
    return body(RecordDict({BODY: ConfigRecord({BODY: data})}))


def ce_lora(folder: Path) -> tuple[int, int, int]:
    """(payload, up, down) of a settled round: what goes up with training, down with delivery and evaluation."""
    labels = ["numpy", "python", "scikit-learn", "scipy", "torch", "transformers"]
    rows = [f"example {number} about {labels[number % 6]},{labels[number % 6]}" for number in range(60)]
    (folder / "data.csv").write_text("\n".join(["text,label", *rows]) + "\n")
    network = {"clients": [CLIENT, "site2"], "labels": labels}
    config = {"method": "ce_lora", "head": "personal", "steps": 2, "network": network}
    path = folder / "federation.toml"
    path.write_text(tomli_w.dumps(config))
    node = {"client": CLIENT, "data": str(folder / "data.csv"), "state": str(folder / "state"), "device": "cpu"}
    office = site.Office()
    opened = office.open(path, Called(RUN, CLIENT, b"", 60.0), node, {})
    codec = opened.spec.codec.for_run(RUN)

    def asked(phase: Phase, round: int, down: Factors) -> tuple[int, int, Factors]:
        request = Request(phase, round, CLIENT, down)
        data = codec.write_request(request)
        reply = site.respond(opened, Called(RUN, CLIENT, data, 60.0))
        sent = PREFIX.pack(RUN, len(CLIENT)) + CLIENT.encode() + data
        return buffer(reply), buffer(sent), codec.read_reply(reply, request).up

    cores: Factors = {}
    up = down = 0
    for round in range(2):
        trained_up, trained_down, cores = asked("train", round, {})
        scored_up, scored_down, _ = asked("evaluate", round + 1, cores)
        up, down = trained_up + scored_up, trained_down + scored_down
    return payload_bytes(cores), up, down


def flower_peft() -> tuple[int, int, int]:
    """(payload, up, down) of LoRA's A and B, an array each, in Flower's own records: one message each way."""
    model = AutoModelForSequenceClassification.from_pretrained(locate("minilm"), num_labels=6)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=8, target_modules=["query", "value"]))
    drawn = torch.Generator().manual_seed(0)  # a B of zeros would be the same object twelve times, and sent once
    state = {
        name: torch.randn(value.shape, generator=drawn)
        for name, value in peft.get_peft_model_state_dict(adapted).items()
    }
    payload = sum(value.numel() * value.element_size() for value in state.values())
    config = ConfigRecord({"server-round": 1, "lr": 3e-3})
    metrics = MetricRecord({"num-examples": 84, "train_loss": 1.25, "accuracy": 0.5, "loss": 1.5})
    arrays = ArrayRecord(state)  # pyright: ignore[reportArgumentType]
    up = body(RecordDict({"arrays": arrays, "metrics": metrics}))
    return payload, up, body(RecordDict({"arrays": arrays, "config": config}))


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--out", type=Path)
    out = options.parse_args().out
    TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = 1
    with tempfile.TemporaryDirectory() as folder:
        rows = [("CE-LoRA, fedtri", *ce_lora(Path(folder))), ("LoRA, Flower + PEFT", *flower_peft())]
    lines = [
        "# Bytes on the wire per client and round", "",
        "MiniLM, rank 8 on query and value (12 layers), float32, heads at home. All messages of a settled round,",
        "bodies as Flower moves them; fedtri's hold two questions and two answers (train, then deliver and evaluate),",
        "with metrics, Flower's and PEFT's one of each.", "", "    python benchmarks/network_bytes.py", "",
        "| | numbers alone | up | down | up / numbers | down / numbers |", "|---|---|---|---|---|---|",
    ]  # fmt: skip
    for name, payload, up, down in rows:
        lines.append(f"| {name} | {payload:,} | {up:,} | {down:,} | {up / payload:.3f} | {down / payload:.3f} |")
    text = "\n".join(lines) + "\n"
    print(text)
    if out is not None:
        out.write_text(text)


if __name__ == "__main__":
    main()
