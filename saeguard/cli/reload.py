"""`saeguard reload`: make a running server read its policies again, and report the outcome."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import typer

from saeguard.cli.options import existing_folder
from saeguard.errors import COULD_NOT_RUN, FINDINGS, CannotRunError


def verb(
    state: Annotated[
        Path,
        typer.Argument(
            help="Folder that the server was started with as --state.", callback=existing_folder
        ),
    ],
    timeout: Annotated[float, typer.Option(help="Seconds to wait for every engine core.")] = 30.0,
) -> None:
    """Make a running server read its policies again, and wait until every engine core has.

    The command needs the right to signal the server's processes. Exit codes: 0 the policies are in
    use, 1 they were refused, 2 the folder is wrong, 3 no server answers.
    """
    from saeguard.reload import state_dir as states

    before = {p: s for p, s in states.read_statuses(state).items() if _runs(s)}
    if not before:
        raise CannotRunError(f"{state}: no running server keeps its state here")
    for status in before.values():
        os.kill(status["pid"], signal.SIGHUP)
    deadline = time.monotonic() + timeout
    waiting = dict(before)
    answers: dict[Path, dict[str, Any]] = {}
    while waiting and time.monotonic() < deadline:
        for path, status in states.read_statuses(state).items():
            if path in waiting and status["asked"] > waiting[path]["asked"]:
                answers[path] = status
                del waiting[path]
        time.sleep(0.02)
    for path, status in answers.items():
        _report(path, status)
    for path in waiting:
        now = states.read_statuses(state).get(path, {})
        held = now.get("waiting")
        why = f"waits for requests under way to end, with {held[:12]}" if held else "no answer"
        typer.echo(f"{path.stem}: {why} within {timeout:g} s", err=True)
    if waiting:
        raise typer.Exit(COULD_NOT_RUN)
    if any(status["error"] is not None for status in answers.values()):
        raise typer.Exit(FINDINGS)


def _report(path: Path, status: dict[str, Any]) -> None:
    from saeguard.reload.difference import Difference

    revision = "" if status["revision"] is None else f", revision {status['revision']}"
    typer.echo(
        f"{path.stem}: {status['last']}: {status['policies']} policies, watch list "
        f"{status['watchlist'][:12]}{revision}"
    )
    change = status.get("last_change")  # a server of an earlier version has none
    if change is not None:
        since = "" if status["last"] == "active" else f"last change at {change['time']}: "
        names = {f.name: tuple(change[f.name]) for f in fields(Difference)}
        typer.echo(f"  {since}{Difference(**names).in_words()}")
    if status.get("compared_only") is not None:
        typer.echo(f"  changes are found by comparing the files: {status['compared_only']}")
    if status["error"] is not None:
        typer.echo(status["error"], err=True)


def _runs(status: dict[str, Any]) -> bool:
    """Return whether the process that wrote a status still runs (its id may be reused)."""
    from saeguard.reload.state_dir import started_at

    return status["started_at"] is not None and started_at(status["pid"]) == status["started_at"]
