"""Print a report: JSON for programs, a table of its rows for people."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import typer

Column = tuple[str, Callable[[Mapping[str, Any]], str]]
"""Heading, and the words for a row."""


def show(
    report: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    columns: Sequence[Column],
    *,
    as_json: bool,
) -> None:
    """Print a report.

    Args:
        report: all of it, for JSON.
        rows: of the table.
        columns: of the table; words are printed as they are, without markup.
        as_json: print JSON.
    """
    if as_json:
        typer.echo(json.dumps(report, indent=2))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(*(heading for heading, _ in columns))
    for row in rows:
        table.add_row(*(Text(words(row)) for _, words in columns))
    Console().print(table)


def number(key: str, form: str = ".3g") -> Callable[[Mapping[str, Any]], str]:
    """Return the words for a number of a row; a dash if it is None."""
    return lambda row: "\u2013" if row[key] is None else format(row[key], form)


def word(key: str) -> Callable[[Mapping[str, Any]], str]:
    """Return the words for a value of a row; several are separated by commas."""

    def words(row: Mapping[str, Any]) -> str:
        value = row[key]
        return ", ".join(map(str, value)) if isinstance(value, list) else str(value)

    return words


def token(key: str) -> Callable[[Mapping[str, Any]], str]:
    """Return the words for a token of a row, with its spaces visible."""
    return lambda row: repr(row[key])


def tokens(key: str, most: int = 5) -> Callable[[Mapping[str, Any]], str]:
    """Return the words for the first tokens of a row's list; empty without an index."""
    return lambda row: " ".join(repr(piece) for piece in row.get(key, [])[:most])
