"""The demo's progress bars."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


@contextmanager
def progress_bar(console: Console, *, count: bool = True) -> Iterator[Progress]:
    """Show bars with a description and the time, and with numbers if `count`."""
    columns = [TextColumn("{task.description:48}"), BarColumn(24)]
    columns += [MofNCompleteColumn()] if count else []
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        yield progress
