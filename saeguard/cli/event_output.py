"""Print and write the answers of `saeguard events`: as a table, JSON, CSV or Parquet."""

from __future__ import annotations

import csv
import io
import json
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from saeguard.atomic_files import write_atomically

if TYPE_CHECKING:
    from saeguard.events.questions import Answer

Form: TypeAlias = Literal["table", "json", "csv", "parquet"]
WIDE = 1000
"""Columns of a terminal that nobody reads; a table is never wrapped in a file or a pipe."""


def shown(answer: Answer, form: Form) -> str:
    """Return an answer as text."""
    match form:
        case "json":
            rows = [dict(zip(answer.columns, map(_plain, row), strict=True)) for row in answer.rows]
            return json.dumps(rows, indent=2) + "\n"
        case "csv":
            out = io.StringIO()
            writer = csv.writer(out, lineterminator="\n")
            writer.writerow(answer.columns)
            writer.writerows([_cell(value) for value in row] for row in answer.rows)
            return out.getvalue()
        case _:
            return _table(answer)


def write(answer: Answer, form: Form, path: Path) -> None:
    """Write an answer to a file."""
    if form != "parquet":
        write_atomically(path, shown(answer, form))
        return
    import pyarrow as pa
    from pyarrow import parquet

    columns = list(zip(*answer.rows, strict=True)) or [() for _ in answer.columns]
    arrays = [pa.array(list(column)) for column in columns]
    parquet.write_table(pa.Table.from_arrays(arrays, names=list(answer.columns)), path)


def _table(answer: Answer) -> str:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    if not answer.rows:
        return "nothing found\n"
    table = Table(box=None, pad_edge=False)
    for i, name in enumerate(answer.columns):
        numbers = all(isinstance(row[i], int | float) for row in answer.rows if row[i] is not None)
        table.add_column(name, justify="right" if numbers else "left", no_wrap=True)
    for row in answer.rows:
        table.add_row(*(Text(_cell(value)) for value in row))
    out = io.StringIO()
    Console(file=out, width=WIDE).print(table)
    return "".join(f"{line.rstrip()}\n" for line in out.getvalue().splitlines())


def _cell(value: Any) -> str:
    match value:
        case None:
            return "-"
        case datetime():
            return _time(value)
        case list() | dict():
            return ", ".join(map(str, value)) if isinstance(value, list) else json.dumps(value)
        case float():
            return f"{value:g}"
        case _:
            return str(value)


def _plain(value: Any) -> Any:
    return _time(value) if isinstance(value, datetime) else value


def _time(value: datetime) -> str:
    return value.strftime("%Y-%m-%dT%H:%M:%SZ")
