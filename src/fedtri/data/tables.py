"""Reads one file with named columns: CSV, TSV, JSON lines, JSON or Parquet. Nothing is cached.

A .csv file quotes as in RFC 4180. A .tsv file does not quote at all (IANA text/tab-separated-values): otherwise one
quotation mark would join all rows up to the next quotation mark.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow as pa
from pyarrow import csv, parquet

from fedtri.errors import FedtriError


def read(path: Path) -> pa.Table:
    """The table in a file. Every cell of a CSV or TSV file is text. Raises FedtriError if the file cannot be read."""
    if path.suffix.lower() not in READERS:
        raise FedtriError(f"{path}: expected a file ending in {', '.join(READERS)}; convert it to one of these")
    try:
        if path.stat().st_size == 0:
            raise FedtriError(f"{path}: the file is empty, expected examples")
        return READERS[path.suffix.lower()](path)
    except (OSError, ValueError, pa.ArrowException) as error:
        reason = str(error).splitlines()[0]
        raise FedtriError(f"{path}: cannot be read as {path.suffix.lower()}: {reason}; correct the file") from error


def delimited(path: Path, delimiter: str, *, quoted: bool, names: Sequence[str] | None = None) -> pa.Table:
    """A table whose cells are all text. The first row names the columns, unless `names` is given."""
    parse = csv.ParseOptions(delimiter=delimiter, quote_char='"' if quoted else False, newlines_in_values=quoted)
    options = csv.ReadOptions(column_names=names)
    found = names or csv.open_csv(path, options, parse).schema.names
    convert = csv.ConvertOptions(column_types=dict.fromkeys(found, pa.string()))
    return csv.read_csv(path, options, parse, convert)


def json_lines(path: Path) -> pa.Table:
    """The table of a file with one JSON object in each line. Blank lines are skipped."""
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), start=1):
        try:
            rows += [json.loads(line)] if line.strip() else []
        except json.JSONDecodeError as error:
            raise ValueError(f"line {number}: {error.msg}") from error
    return of_objects(rows)


def json_array(path: Path) -> pa.Table:
    """The table of a file with one JSON array of objects."""
    return of_objects(json.loads(path.read_text(encoding="utf-8-sig")))


def of_objects(rows: object) -> pa.Table:
    """A table with a column for every key of any object. A missing key is null."""
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError("expected objects whose keys are the columns")
    return pa.Table.from_struct_array(pa.array(rows, type=None if rows else pa.struct([])))


READERS: dict[str, Callable[[Path], pa.Table]] = {
    ".csv": lambda path: delimited(path, ",", quoted=True),
    ".tsv": lambda path: delimited(path, "\t", quoted=False),
    ".jsonl": json_lines,
    ".json": json_array,
    ".parquet": parquet.read_table,
}


def first_line(path: Path) -> str:
    """The first line of a file, without a byte-order mark; "" if there is no such file."""
    if not path.is_file():
        return ""
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        return file.readline().rstrip("\r\n")
