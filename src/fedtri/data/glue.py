"""GLUE tasks (arXiv:1804.07461) in GLUE's own layout: a folder with train.tsv and dev.tsv, without quoting.

SST-2, MRPC, RTE and QNLI are recognised by the header of their files, so a folder may have any name. CoLA's files have
four fields and no header. train.tsv is read, or dev.tsv if there is no train.tsv. To read the other one, name the file
itself. test.tsv has no labels and is never read.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedtri.data import tables
from fedtri.data.pool import Source


@dataclass(frozen=True)
class Layout:
    """The columns of a task that are used. `label_names` is given if its files hold numbers as labels."""

    texts: tuple[str, ...]
    label_names: Mapping[Any, str] | None = None
    names: tuple[str, ...] | None = None
    """The names of the columns, if the files have no header."""
    label: str = "label"


ENTAILMENT = {"entailment": "entailment", "not_entailment": "not_entailment"}
HEADERS = {
    "sentence\tlabel": Layout(("sentence",), {"0": "negative", "1": "positive"}),
    "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String": Layout(
        ("#1 String", "#2 String"), {"0": "not_equivalent", "1": "equivalent"}, label="Quality"
    ),
    "index\tsentence1\tsentence2\tlabel": Layout(("sentence1", "sentence2"), ENTAILMENT),
    "index\tquestion\tsentence\tlabel": Layout(("question", "sentence"), ENTAILMENT),
}
COLA = Layout(("sentence",), {"0": "unacceptable", "1": "acceptable"}, ("source", "label", "judgement", "sentence"))
COLA_LINE = re.compile(r"[^\t]+\t[01]\t\*?\t[^\t]+")


def find(path: Path) -> Source | None:
    """The task in a folder, or in one of its files; None if it is something else."""
    file = path
    if path.is_dir():
        file = path / ("train.tsv" if (path / "train.tsv").is_file() else "dev.tsv")
    elif path.name not in ("train.tsv", "dev.tsv"):
        return None
    line = tables.first_line(file)
    layout = COLA if COLA_LINE.fullmatch(line) else HEADERS.get(line)
    if layout is None:
        return None
    table = tables.delimited(file, "\t", quoted=False, names=layout.names)
    columns = dict(zip(("text", "text_pair"), layout.texts, strict=False)) | {"label": layout.label}
    names = {layout.label: layout.label_names} if layout.label_names else {}
    return Source(file.parent.name, str(file), table, columns, names)
