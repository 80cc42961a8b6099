"""AG News (arXiv:1509.01626): a CSV file without a header; its columns are class (1 to 4), title and description.

The text is the title, a space, and the description. In a folder, train.csv is read, or test.csv if there is no
train.csv. To read the other one, name the file itself.
"""

import re
from pathlib import Path

import pyarrow as pa

from fedtri.data import tables
from fedtri.data.pool import Source

LABELS = {"1": "World", "2": "Sports", "3": "Business", "4": "Sci/Tech"}
LINE = re.compile(r'"?[1-4]"?,("([^"]|"")*"|[^",]*),.+')


def find(path: Path) -> Source | None:
    """AG News in a folder or a file; None if it holds something else."""
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
