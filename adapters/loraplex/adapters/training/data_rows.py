"""JSONL, CSV and Parquet files and hub data sets as rows of named values, each with the place it came from.

Reads one row at a time; knows nothing of what the columns mean.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loraplex.adapters.errors import NotFoundError
from loraplex.adapters.training.data_error import DataError

MAX_ROW_BYTES = 16 << 20
"""Of a line of JSONL, or of a CSV record: more is no row but a file whose line ends are lost."""


@dataclass(frozen=True)
class DataRow:
    """A row as it was read; `place` is "file:line" for people."""

    place: str
    values: Mapping[str, Any]


def read_rows(source: str, split: str = "train") -> Iterator[DataRow]:
    """Yield the rows of the file `source`, or of the `split` of the hub data set of that id ("owner/name:config").

    Raises:
        NotFoundError: there is no such file, or the data set cannot be fetched.
        DataError: the file is empty, damaged, not UTF-8, or a row is no row; names the line.
    """
    path = Path(source).expanduser()
    reader = _READERS.get(path.suffix.lower())
    if path.is_dir():
        raise NotFoundError(f"{path} is a folder: give a file ({', '.join(_READERS)}) or the id of a hub data set")
    if path.is_file():
        if reader is None:
            raise DataError.at(path.name, f"has a kind that is not read here; known are {', '.join(_READERS)}")
        rows = reader(path)
    elif reader is not None:
        raise NotFoundError(f"there is no data file {path}")
    else:
        rows = _hub_rows(source, split)
    count = 0
    for row in rows:
        count += 1
        yield row
    if not count:
        raise DataError.at(path.name, "is empty: there is not one row in it")


def _jsonl_rows(path: Path) -> Iterator[DataRow]:
    for number, line in _lines(path):
        place = f"{path.name}:{number}"
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError.at(place, f"is not JSON: {error}") from error
        if not isinstance(values, dict):
            raise DataError.at(place, f"must be a JSON object with named fields, not {line.strip():.60}")
        yield DataRow(place, values)


def _csv_rows(path: Path) -> Iterator[DataRow]:
    """Yield the records of a CSV or TSV file whose first record names the columns."""
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    limit = csv.field_size_limit(MAX_ROW_BYTES)
    try:
        records = csv.reader((line for _, line in _lines(path)), delimiter=delimiter, strict=True)
        names: list[str] = []
        while True:
            place = f"{path.name}:{records.line_num + 1}"
            try:
                record = next(records, None)
            except csv.Error as error:
                raise DataError.at(place, f"is not CSV: {error}") from error
            if record is None:
                return
            if not record:
                continue
            if not names:
                names = record
                _check_names(names, place)
            elif len(record) != len(names):
                raise DataError.at(place, f"has {len(record)} values for the {len(names)} columns {', '.join(names)}")
            else:
                yield DataRow(place, dict(zip(names, record, strict=True)))
    finally:
        csv.field_size_limit(limit)


def _check_names(names: list[str], place: str) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise DataError.at(place, f"names a column twice: {', '.join(twice)}")


def _parquet_rows(path: Path) -> Iterator[DataRow]:
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for values in batch.to_pylist():
                    number += 1
                    yield DataRow(f"{path.name}, row {number}", values)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError.at(path.name, f"is not a Parquet file that can be read: {error!s:.200}") from error


def _hub_rows(source: str, split: str) -> Iterator[DataRow]:
    """Yield the rows of a data set that the `datasets` library fetches; it runs no code of the data set."""
    import datasets

    name, _, config = source.partition(":")
    try:
        found = datasets.load_dataset(name, config or None, split=split)
    except Exception as error:  # datasets and the hub's client raise anything here
        message = f"there is no data file {source}, and no data set of that id can be fetched: {error!s:.300}"
        raise NotFoundError(message) from error
    for number, values in enumerate(found, 1):
        yield DataRow(f"{source}[{split}], row {number}", values)


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the lines of a UTF-8 file with their numbers from 1; a byte order mark is left out."""
    with path.open("rb") as file:
        number = 0
        while line := file.readline(MAX_ROW_BYTES + 1):
            number += 1
            if len(line) > MAX_ROW_BYTES:
                limit = MAX_ROW_BYTES >> 20
                raise DataError.at(
                    f"{path.name}:{number}", f"is longer than {limit} MiB; is every row on its own line?"
                )
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                found = f"byte 0x{line[error.start]:02x} at position {error.start + 1}"
                raise DataError.at(f"{path.name}:{number}", f"is not UTF-8 ({found}): convert the file") from error
            yield number, text


_READERS: dict[str, Callable[[Path], Iterator[DataRow]]] = {
    ".jsonl": _jsonl_rows,
    ".ndjson": _jsonl_rows,
    ".csv": _csv_rows,
    ".tsv": _csv_rows,
    ".parquet": _parquet_rows,
}
