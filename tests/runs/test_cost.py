"""`fedtri cost` says what a run sends: by hand for one layer, and for every method against the bytes of a run."""

import csv
import json

import pytest

from fedtri.communication import framing
from fedtri.communication.compression import Types
from fedtri.communication.numbers import NUMBERS, payload_bytes
from fedtri.errors import FedtriError
from fedtri.runs import cost
from tiny import NEEDS, rounds

TARGETS = "query,value,intermediate.dense"


def test_by_hand(lab):
    """Two layers of two 16 x 16 and one 24 x 16 linear layer, rank 3, a pooled head of 3 x 16 + 3."""
    found = {c.method: c for c in cost.costs(str(lab.model()), rank=3, targets=TARGETS, labels=3)}
    head = 3 * 16 + 3
    pair = 2 * (3 * (16 + 16) * 2 + 3 * (16 + 24))
    assert found["fedit"].up == found["fedit"].down == pair + head
    assert found["ce_lora"].up == 2 * 3 * 3 * 3
    assert found["fed_sb"].up == 2 * 3 * 3 * 3 + head
    assert found["flora"].down == 2 * (16 * 16 * 2 + 24 * 16) + head
    assert found["local"].up == found["local"].down == 0
    assert "ravan" not in found, "two heads do not divide rank 3"


@pytest.mark.parametrize("method", ["local", "full", "rolora", "flora", "ce_lora", "ravan"])
def test_it_is_what_a_run_sends_as_payload(lab, tmp_path, monkeypatch, method):
    messages = []
    encode = framing.encode
    monkeypatch.setattr(
        framing, "encode", lambda message, *args, **named: messages.append(message) or encode(message, *args, **named)
    )
    settings = {"rank": 4, "method": method, "clients": 2, "steps": 1} | NEEDS.get(method, {})
    built = lab.federation(tmp_path, **settings)
    list(rounds(built, rounds=2))
    clients = len(built.transport.clients())
    up = [m for m in messages if m.phase == "train" and m.num_examples]
    down = [m for m in messages if not m.num_examples]
    expected = next(
        c for c in cost.costs(str(lab.model()), rank=4, targets=built.config.targets, labels=3) if c.method == method
    )
    assert len(up) == 2 * clients
    assert sum(payload_bytes(m.factors) for m in up) / len(up) == expected.up_bytes
    assert sum(payload_bytes(m.factors) for m in down) / (2 * clients) == expected.down_bytes


@pytest.mark.parametrize("method", ["fedit", "flora", "gradient_core"])
def test_so_it_is_in_few_bits(method, lab, tmp_path, monkeypatch):
    """One bit up, four down, a basis and a head's first value in float16. Seen to fail with one type for all."""
    sizes = []
    encode = framing.encode

    def counting(message, *args, **named):
        ways = message.ways.items()
        sizes.append(sum(NUMBERS[way.numbers].size(message.factors[key].numel()) for key, way in ways))
        return encode(message, *args, **named)

    monkeypatch.setattr(framing, "encode", counting)
    wire = {"up": "sign", "down": "int4", "basis": "float16"}
    built = lab.federation(tmp_path, method=method, rank=4, **{f"wire__{key}": value for key, value in wire.items()})
    list(rounds(built, rounds=3))
    found = cost.costs(
        str(lab.model()), rank=4, targets=built.config.targets, labels=3, clients=4, rounds=3, wire=Types(**wire)
    )
    assert sum(sizes) == next(one.total_bytes for one in found if one.method == method)


def test_the_config_alone_is_enough(lab, tmp_path):
    (tmp_path / "config.json").write_text((lab.model() / "config.json").read_text())
    by_file, by_folder = (
        cost.costs(str(path), rank=4, clients=10, rounds=5) for path in (tmp_path / "config.json", lab.model())
    )
    assert by_file == by_folder
    assert by_file[0].method == "full"
    assert by_file[0].total_bytes == (by_file[0].up + by_file[0].down) * 4 * 10 * 5


def test_it_writes_json_and_csv_and_nothing_else(lab, tmp_path):
    found = cost.costs(str(lab.model()), rank=4)
    for name in ("cost.json", "cost.csv"):
        cost.write(tmp_path / name, found)
    assert [row["method"] for row in json.loads((tmp_path / "cost.json").read_text())] == [c.method for c in found]
    with (tmp_path / "cost.csv").open() as file:
        assert [float(row["up"]) for row in csv.DictReader(file)] == [c.up for c in found]
    with pytest.raises(FedtriError, match="json"):
        cost.write(tmp_path / "cost.txt", found)
