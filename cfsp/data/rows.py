"""Rows of untrusted files: JSON lines, CSV, parquet and saved datasets, read with bounded memory."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from cfsp.data.text_files import MAX_LINE, arrow_files, file_form, lines, listed, most_row_bytes, open_text
from cfsp.errors import DataError

#: Most characters of a file that is one JSON array: it is parsed as a whole, and takes several times its size.
MAX_ARRAY = 50_000_000


def rows(path: Path, label: str, column: str | None = None, key: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (place, row) for each row of a file; a place is ``line 3`` or ``row 3``.

    Args:
        path: the file, or the folder of a saved dataset.
        label: how messages name it.
        column: only column to read, if the form has columns; None: all.
        key: configuration key of the column, for messages.

    Raises:
        DataError: a row is not JSON, there is no such column, or the file holds too much text.
    """
    form = file_form(path)
    if form in ("json", "txt"):
        yield from _json_rows(path, label)
    elif form in ("csv", "tsv"):
        yield from _csv_rows(path, label, column, key, "\t" if form == "tsv" else ",")
    else:
        read_batches = _parquet_batches if form == "parquet" else _arrow_batches
        yield from _batch_rows(read_batches(path, label, column, key), label, most_row_bytes(path))


def text_of(row: Any, field: str, key: str, place: str, path: Path) -> str:
    """Return the text of a row.

    Args:
        row: the row.
        field: field with the text.
        key: configuration key of the section, for messages.
        place: where the row stands in the file, for messages.
        path: the file.

    Raises:
        DataError: the row is no object, has no such field, or the field is no text.
    """
    where = f"{place} of {path}"
    if not isinstance(row, Mapping):
        raise DataError(
            f"{key}.path={path}: {place} is {kind_of(row)} which holds no such text; one JSON object a line is "
            f'needed, {{"{field}": "..."}}'
        )
    if field not in row:
        raise DataError(f"{key}.text_field={field}: {where} has no such text; it has {listed(row)}")
    if not isinstance(row[field], str):
        raise DataError(f"{key}.text_field={field}: in {where} it is {kind_of(row[field])}; text is needed")
    return str(row[field])


def kind_of(value: Any) -> str:
    """Describe a JSON value in plain words."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return f"the number {str(value)[:40]}"
    if isinstance(value, str):
        return "a bare string"
    if isinstance(value, Mapping):
        return "an object"
    return "a list" if isinstance(value, list | tuple) else "no text"


def parse_row(line: str, label: str, place: str) -> Any:
    """Parse one row of a file of JSON lines.

    Raises:
        DataError: the row is not JSON or nested too deeply.
    """
    try:
        return json.loads(line)
    except RecursionError as error:
        raise DataError(f"{label}: {place} is JSON that is nested too deep; no row of a text is") from error
    except ValueError as error:
        reason = "a number of thousands of digits" if "digits" in str(error) else str(error)
        raise DataError(f"{label}: {place} is not JSON ({reason}); one JSON object a line is needed") from error


def _json_rows(path: Path, label: str) -> Iterator[tuple[str, Any]]:
    source = enumerate(lines(path, label), 1)
    first = next(((number, line) for number, line in source if line.strip()), None)
    if first is None:
        return
    if first[1].lstrip()[:1] == "[" and _begins_array_of_rows(path, first[1]):
        with open_text(path, label) as stream:
            text = stream.read(MAX_ARRAY + 1)
        if len(text) > MAX_ARRAY:
            raise DataError(
                f"{label}: an array of more than {MAX_ARRAY:,} characters, which would be parsed as a whole; write one "
                "row a line (.jsonl), which has no such limit"
            )
        array = parse_row(text, label, "the array")
        yield from ((f"row {number}", row) for number, row in enumerate(array, 1))
        return
    for number, line in chain([first], source):
        if line.strip():
            yield f"line {number}", parse_row(line, label, f"line {number}")


def _begins_array_of_rows(path: Path, line: str) -> bool:
    """Return whether a line opens an array of rows; otherwise it is a row that is a list."""
    if ".jsonl" not in path.name.lower() and ".ndjson" not in path.name.lower():
        return True
    return line.strip() == "[" or line.lstrip()[1:].lstrip()[:1] == "{"


def _csv_rows(path: Path, label: str, column: str | None, key: str, delimiter: str) -> Iterator[tuple[str, Any]]:
    csv.field_size_limit(MAX_LINE)
    with open_text(path, label, newline="") as stream:
        reader = csv.reader(stream, delimiter=delimiter)
        names = next(reader, [])
        if column is not None and column not in names:
            raise DataError(f"{key}={column}: {path} has no such column; its first line has {listed(names)}")
        for number, cells in enumerate(reader, 1):
            if cells:
                yield f"row {number}", dict(zip(names, cells, strict=False))


def _parquet_batches(path: Path, label: str, column: str | None, key: str) -> Iterator[Any]:
    import pyarrow.parquet as parquet

    with parquet.ParquetFile(path, memory_map=True) as file:
        _check_column(column, file.schema_arrow.names, key, path)
        yield from file.iter_batches(64, columns=None if column is None else [column], use_threads=False)


def _arrow_batches(folder: Path, label: str, column: str | None, key: str) -> Iterator[Any]:
    import pyarrow

    for file in arrow_files(folder, label):
        with pyarrow.memory_map(str(file)) as source, pyarrow.ipc.open_stream(source) as reader:
            _check_column(column, reader.schema.names, key, folder)
            for batch in reader:
                chosen = batch if column is None else batch.select([column])
                yield from (chosen.slice(begin, 64) for begin in range(0, chosen.num_rows, 64))


def _check_column(column: str | None, names: list[str], key: str, path: Path) -> None:
    if column is not None and column not in names:
        raise DataError(f"{key}={column}: {path} has no such column; it has {listed(names)}")


def _batch_rows(batches: Iterable[Any], label: str, max_bytes: int) -> Iterator[tuple[str, Any]]:
    number = total = 0
    for batch in batches:
        total += batch.nbytes
        if total > max_bytes:
            raise DataError(
                f"{label}: its rows hold more than {max_bytes:,} bytes, too many for this file; give a smaller one"
            )
        for row in batch.to_pylist():
            number += 1
            yield f"row {number}", row
