"""Every kind of input becomes the same pool, and every mistake in it one line that says where it is."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from fedtri import data
from fedtri.data import Pool
from fedtri.errors import FedtriError
from fedtri.tasks.text_classification import pool as made

ROWS = [{"text": f"text {row}, said", "label": label} for row, label in enumerate(["b", "a", "b", "a", "c", "c"])]


def load_pool(name: str, columns: dict[str, str] | None = None, **more) -> Pool:
    return data.load_pool(name, made, columns=columns, **more)


def write(path: Path, text: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return str(path)


def csv_of(rows: list[dict], delimiter: str = ",") -> str:
    quote = '"' if delimiter == "," else ""
    lines = [delimiter.join(rows[0])]
    lines += [delimiter.join(f"{quote}{value}{quote}" for value in row.values()) for row in rows]
    return "\n".join(lines) + "\n"


def save(folder: Path, suffix: str) -> str:
    path = folder / f"mine{suffix}"
    if suffix == ".parquet":
        parquet.write_table(pa.Table.from_pylist(ROWS), path)
        return str(path)
    return write(
        path,
        {
            ".csv": csv_of(ROWS),
            ".tsv": csv_of(ROWS, "\t"),
            ".jsonl": "\n".join(map(json.dumps, ROWS)),
            ".json": json.dumps(ROWS),
        }[suffix],
    )


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".json", ".parquet"])
def test_every_format_gives_the_same_pool(tmp_path, suffix):
    pool = load_pool(save(tmp_path, suffix))
    assert (pool.name, pool.label_names) == ("mine", ("a", "b", "c"))
    assert pool.table["text"][:] == [row["text"] for row in ROWS]
    assert pool.table["label"][:] == [1, 0, 1, 0, 2, 2]
    assert pool.table.features["label"].dtype == "int64"


def test_a_folder_is_read_by_datasets_without_a_word(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    write(tmp_path / "folder" / "train.csv", csv_of(ROWS))
    pool = load_pool(str(tmp_path / "folder"))
    assert pool.table["label"][:] == [1, 0, 1, 0, 2, 2]
    assert capfd.readouterr() == ("", "")


def test_named_columns_become_a_pair_and_the_rest_keep_their_names(tmp_path):
    rows = [{"q": f"q{i}", "a": f"a{i}", "right": i % 2, "user": "u"} for i in range(4)]
    pool = load_pool(write(tmp_path / "x.csv", csv_of(rows)), {"text": "q", "text_pair": "a", "label": "right"})
    assert pool.table[1] == {"text": "q1", "text_pair": "a1", "label": 1, "right": "1", "user": "u"}


def test_labels_that_are_numbers_are_ordered_as_numbers(tmp_path):
    rows = [{"text": "t", "label": label} for label in [10, 9, 10, 9]]
    for path in (write(tmp_path / "x.csv", csv_of(rows)), write(tmp_path / "x.json", json.dumps(rows))):
        assert load_pool(path).label_names == ("9", "10")


def test_a_lone_quote_in_a_tsv_swallows_nothing(tmp_path):
    path = write(tmp_path / "x.tsv", 'text\tlabel\n"open\t0\nb\t1\n"c\t0\nd\t1\n')
    assert load_pool(path).table["text"][:] == ['"open', "b", '"c', "d"]


def test_limit_is_a_seeded_subsample(tmp_path):
    path = write(tmp_path / "x.csv", csv_of([{"text": f"t{i}", "label": i % 2} for i in range(100)]))
    one, again, other = (load_pool(path, limit=20, seed=seed).table["text"][:] for seed in (1, 1, 2))
    assert len(one) == 20
    assert one == again != other
    assert len(load_pool(path, limit=1000).table) == 100


GLUE = {
    "SST-2": (
        'sentence\tlabel\na "lone quote\t0\nfine \t1\nbad\t0\ngood\t1\n',
        ("negative", "positive"),
        False,
    ),
    "MRPC": (
        "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\n"
        '1\t11\t12\t" Left\tright\n0\t21\t22\tc\td\n1\t1\t2\tx\ty\n0\t1\t2\tx\ty\n',
        ("not_equivalent", "equivalent"),
        True,
    ),
    "RTE": (
        "index\tsentence1\tsentence2\tlabel\n" + "0\tx\ty\tnot_entailment\n1\tx\ty\tentailment\n" * 2,
        ("entailment", "not_entailment"),
        True,
    ),
    "QNLI": (
        "index\tquestion\tsentence\tlabel\n" + "0\tx\ty\tentailment\n1\tx\ty\tnot_entailment\n" * 2,
        ("entailment", "not_entailment"),
        True,
    ),
    "CoLA": (
        'gj04\t1\t\tIt is "so.\ngj04\t0\t*\tIt so is.\n' * 2,
        ("unacceptable", "acceptable"),
        False,
    ),
}


@pytest.mark.parametrize("task", GLUE)
def test_glue_is_known_by_its_header_and_never_quoted(tmp_path, task):
    text, names, pair = GLUE[task]
    write(tmp_path / task / "dev.tsv", text)
    pool = load_pool(str(tmp_path / task))
    assert (pool.name, pool.label_names, len(pool.table)) == (task, names, 4)
    assert ("text_pair" in pool.table.column_names) is pair
    assert sorted(pool.table["label"]) == [0, 0, 1, 1]


def test_train_goes_before_dev_unless_the_file_is_named(tmp_path):
    header = "sentence\tlabel\n"
    write(tmp_path / "train.tsv", header + "train\t0\ntrain\t1\n" * 2)
    dev = write(tmp_path / "dev.tsv", header + "dev\t0\ndev\t1\n" * 2)
    assert set(load_pool(str(tmp_path)).table["text"]) == {"train"}
    assert set(load_pool(dev).table["text"]) == {"dev"}


@pytest.mark.parametrize("name", ["", "test.csv"])
def test_ag_news(tmp_path, name):
    lines = [f'"{label}","Title, {label}","A ""quoted"" line\\break"' for label in (3, 4, 1, 2) * 2]
    write(tmp_path / "test.csv", "\n".join(lines))
    pool = load_pool(str(tmp_path / name))
    assert pool.label_names == ("World", "Sports", "Business", "Sci/Tech")
    assert pool.table[0] == {"text": 'Title, 3 A "quoted" line break', "label": 2}


BAD = {
    "missing file": ("nope.csv", None, ["nope.csv", "no such file"]),
    "unknown suffix": ("x.txt", "text", ["x.txt", ".jsonl"]),
    "empty file": ("x.csv", "", ["x.csv", "empty"]),
    "header alone": ("x.csv", "text,label\n", ["x.csv", "no examples"]),
    "missing text column": ("x.csv", "body,label\na,b\n", ['"text"', "body, label", "columns.text"]),
    "missing label column": ("x.csv", "text,topic\na,b\n", ['"label"', "text, topic", "columns.label"]),
    "column twice": ("x.csv", "text,label,label\na,b,c\n", ['"label"', "more than once"]),
    "ragged row": ("x.csv", "text,label\na,b\na,b,c\n", ["x.csv", "Expected 2 columns, got 3"]),
    "open quote": ("x.csv", 'text,label\n"a,b\nc,d\n', ["x.csv"]),
    "malformed line": ("x.jsonl", '{"text": "a", "label": 1}\n{"text"\n', ["x.jsonl", "line 2"]),
    "not objects": ("x.json", "[1, 2]", ["x.json", "expected objects"]),
    "no objects": ("x.json", "[]", ["x.json", "no examples"]),
    "labels of two kinds": (
        "x.jsonl",
        '{"text": "a", "label": 1}\n{"text": "a", "label": "b"}\n',
        ["x.jsonl"],
    ),
    "not parquet": ("x.parquet", "text", ["x.parquet", "cannot be read"]),
    "empty text": ("x.csv", "text,label\na,0\n ,1\n", ['"text"', "1 of 2 rows", "example 2"]),
    "null text": ("x.jsonl", '{"text": "a", "label": 1}\n{"label": 2}\n', ['"text"', "example 2"]),
    "number as text": ("x.jsonl", '{"text": 1, "label": 1}\n', ['"text"', "int64", "expected text"]),
    "empty label": ("x.csv", "text,label\na,0\nb,\n", ['"label"', "example 2"]),
    "label seen once": ("x.csv", "text,label\na,x\nb,y\nc,x\n", ['"label"', "'y'", "once"]),
    "one label": ("x.csv", "text,label\na,x\nb,x\n", ['"label"', "'x'", "at least two"]),
    "unlabelled GLUE": ("SST-2/dev.tsv", "sentence\tlabel\na\t-1\n", ['"label"', "'-1'", "'0', '1'"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_that_names_it(tmp_path, case):
    name, text, expected = BAD[case]
    path = str(tmp_path / name) if text is None else write(tmp_path / name, text)
    with pytest.raises(FedtriError) as caught:
        load_pool(path)
    message = str(caught.value)
    assert "\n" not in message
    assert all(part in message for part in expected), message


def test_not_utf8(tmp_path):
    (tmp_path / "x.csv").write_bytes("text,label\ncafé,0\n".encode("latin-1"))
    with pytest.raises(FedtriError, match=r"x\.csv.*UTF8"):
        load_pool(str(tmp_path / "x.csv"))


def test_a_name_that_is_nothing_says_what_was_tried(monkeypatch):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(FedtriError, match='data "docstring": neither "docstrings", "digits" nor a file or folder'):
        load_pool("docstring")


def test_limit_that_leaves_a_label_once_says_so(tmp_path):
    path = write(tmp_path / "x.csv", csv_of([{"text": "t", "label": i // 2} for i in range(100)]))
    with pytest.raises(FedtriError, match=r"limit = 10 .* raise limit"):
        load_pool(path, limit=10)
    with pytest.raises(FedtriError, match="limit: expected at least 2"):
        load_pool(path, limit=0)


def test_docstrings_have_their_own_columns():
    with pytest.raises(FedtriError, match=r"leave out \[columns\]"):
        load_pool("docstrings", {"label": "label"})


def test_class_labels_keep_their_names(tmp_path, monkeypatch):
    import datasets

    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["z", "a"])})
    table = datasets.Dataset.from_dict({"text": list("wxyz"), "label": [0, 1, 0, 1]}, features=features)
    monkeypatch.setattr("datasets.load_dataset", lambda name, config: datasets.DatasetDict(validation=table))
    pool = load_pool("owner/corpus:plain")
    assert (pool.name, pool.label_names) == ("corpus", ("z", "a"))
    assert np.array_equal(pool.table["label"], [0, 1, 0, 1])
