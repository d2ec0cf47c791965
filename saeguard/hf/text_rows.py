"""Read the rows of a file of texts, one at a time: JSON lines, CSV or Parquet, by its name."""

from __future__ import annotations

import csv
import json
from codecs import BOM_UTF8, BOM_UTF16_BE, BOM_UTF16_LE
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeAlias

from saeguard.errors import InputError

MOST_CHARACTERS = 2**31 - 1
"""Of a cell; the csv module's own bound is too low for long texts."""


class TextError(InputError):
    """A row of a file of texts is wrong; the message names file, line and field."""


Row: TypeAlias = tuple[int, Any]
"""A number and a content: of a line; of the last line of a CSV row; of a Parquet row, from 1. The
content of a row that cannot be read is a `TextError`."""


def rows(path: Path) -> Iterator[Row]:
    """Yield the rows of a file that are not blank.

    Args:
        path: `*.csv` and `*.parquet` are tables whose columns are the keys; all else is JSON lines.

    Raises:
        TextError: the file as a whole cannot be read.
    """
    try:
        match path.suffix.lower():
            case ".csv":
                yield from _csv(path)
            case ".parquet":
                yield from _parquet(path)
            case _:
                yield from _json_lines(path)
    except OSError as error:
        raise TextError(f"{path}: {error.strerror or error}") from error


def _json_lines(path: Path) -> Iterator[Row]:
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            line = raw.removeprefix(BOM_UTF8) if number == 1 else raw
            if number == 1 and raw.startswith((BOM_UTF16_LE, BOM_UTF16_BE)):
                raise TextError(f"{path}: found UTF-16, expected UTF-8; save it as UTF-8")
            if not line.strip():
                continue
            try:
                yield number, json.loads(line.decode())
            except UnicodeDecodeError as error:
                what = f"byte 0x{line[error.start]:02x} is not UTF-8; save the file as UTF-8"
                yield number, TextError(f"{path}:{number}: {what}")
            except (ValueError, RecursionError) as error:
                hint = _hint(line) if number == 1 else ""
                yield number, TextError(f"{path}:{number}: not JSON: {error}{hint}")


def _hint(line: bytes) -> str:
    """Return what a first line that is not JSON may be meant as."""
    if line.lstrip().startswith(b"["):
        return "; write one object a line, as `jq -c '.[]'` does of an array"
    if b"," in line and not line.lstrip().startswith(b"{"):
        return "; if this is CSV, name the file NAME.csv"
    return ""


def _csv(path: Path) -> Iterator[Row]:
    csv.field_size_limit(MOST_CHARACTERS)
    with path.open(encoding="utf-8-sig", newline="") as file:
        try:
            reader = csv.DictReader(file, strict=True)
            columns = reader.fieldnames or []
        except UnicodeDecodeError as error:
            raise TextError(f"{path}: {error}; save it as UTF-8") from error
        if "id" not in columns:
            found = ", ".join(columns) or "an empty file"
            raise TextError(
                f"{path}:1: found the columns {found[:200]}; expected id, and text or prompt, "
                "separated by commas"
            )
        while True:
            try:
                cells = next(reader, None)
            except (csv.Error, UnicodeDecodeError) as error:
                yield reader.line_num, TextError(f"{path}:{reader.line_num}: not CSV: {error}")
                if isinstance(error, UnicodeDecodeError):
                    return  # which ends the decoder
                continue
            if cells is None:
                return
            yield reader.line_num, _of_cells(path, reader.line_num, cells, len(columns))


def _of_cells(path: Path, number: int, cells: dict[Any, Any], columns: int) -> Any:
    """Return the content of a CSV row: no empty cells, numbers and messages by their meaning."""
    if None in cells:
        found = columns + len(cells[None])
        return TextError(
            f"{path}:{number}: found {found} cells, expected {columns}; put a text with commas in "
            "quotes"
        )
    content: dict[str, Any] = {key: cell for key, cell in cells.items() if cell}
    label = content.get("label", "")
    if label.isascii() and label.isdecimal():
        content["label"] = int(label)
    messages = content.get("messages")
    if messages is not None:
        try:
            content["messages"] = json.loads(messages)
        except ValueError as error:
            return TextError(f"{path}:{number}: messages: not JSON: {error}")
    return content


def _parquet(path: Path) -> Iterator[Row]:
    import pyarrow as pa  # noqa: PLC0415 - of the extra `tables`
    from pyarrow import parquet  # noqa: PLC0415

    try:
        file = parquet.ParquetFile(path)
    except pa.ArrowInvalid as error:
        raise TextError(f"{path}: not Parquet: {error}") from error
    number = 0
    with file:
        for batch in file.iter_batches():
            for content in batch.to_pylist():
                number += 1
                yield number, _without_null(content)


def _without_null(value: Any) -> Any:
    """Return a value without its keys of null, which tables have for a key that is missing."""
    match value:
        case dict():
            return {key: _without_null(item) for key, item in value.items() if item is not None}
        case list():
            return [_without_null(item) for item in value]
        case _:
            return value
