"""AG News (arXiv:1509.01626): a CSV without a header, of class (1 to 4), title and description.

The text is the title and the description with a blank between them. The pool of a folder is train.csv, or
test.csv where there is no train.csv; to take the other one, name the file itself.
"""

import re
from pathlib import Path

import pyarrow as pa

from fedtri.data import tables
from fedtri.data.pool import Source

LABELS = {"1": "World", "2": "Sports", "3": "Business", "4": "Sci/Tech"}
LINE = re.compile(r'"?[1-4]"?,("([^"]|"")*"|[^",]*),.+')


def find(path: Path) -> Source | None:
    """AG News in a folder or a file; None where it is something else."""
    file = path
    if path.is_dir():
        file = path / ("train.csv" if (path / "train.csv").is_file() else "test.csv")
    if file.suffix != ".csv" or not LINE.fullmatch(tables.first_line(file)):
        return None
    table = tables.delimited(file, ",", quoted=True, names=("class", "title", "description"))
    parts = zip(table["title"].to_pylist(), table["description"].to_pylist(), strict=True)
    # The corpus was published with its line breaks as backslashes.
    texts = [f"{title} {description}".replace("\\", " ").strip() for title, description in parts]
    found = pa.table({"text": texts, "label": table["class"]})
    return Source("ag_news", str(file), found, {"text": "text", "label": "label"}, {"label": LABELS})
