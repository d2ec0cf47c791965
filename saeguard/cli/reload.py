"""`saeguard reload`: have a running server read its policies again, and say what came of it."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Annotated, Any

import typer


def verb(
    state: Annotated[Path, typer.Argument(help="The server's `state` folder.")],
    timeout: Annotated[float, typer.Option(help="Seconds to wait for an answer.")] = 30.0,
) -> None:
    """Signal every engine core of a server, and wait until each has read the policies.

    Who may do so is decided by the system: it takes the right to signal the server's processes.
    Exits with 0 where the files are in use now, 1 where they were refused, 2 where no server
    answers.
    """
    from saeguard.reload import state_dir as states

    before = {p: s for p, s in states.read_statuses(state).items() if _runs(s)}
    if not before:
        typer.echo(f"{state}: no running server keeps its state here", err=True)
        raise typer.Exit(2)
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
        _tell(path, status)
    for path in waiting:
        now = states.read_statuses(state).get(path, {})
        held = now.get("waiting")
        why = f"waits for requests under way to end, with {held[:12]}" if held else "no answer"
        typer.echo(f"{path.stem}: {why} within {timeout:g} s", err=True)
    if waiting:
        raise typer.Exit(2)
    if any(status["error"] is not None for status in answers.values()):
        raise typer.Exit(1)


def _tell(path: Path, status: dict[str, Any]) -> None:
    revision = "" if status["revision"] is None else f", revision {status['revision']}"
    typer.echo(
        f"{path.stem}: {status['last']}: {status['policies']} policies, watch list "
        f"{status['watchlist'][:12]}{revision}"
    )
    if status["error"] is not None:
        typer.echo(status["error"], err=True)


def _runs(status: dict[str, Any]) -> bool:
    """Return whether the process that wrote a status is there, and not another of its number."""
    from saeguard.reload.state_dir import started_at

    return status["started_at"] is not None and started_at(status["pid"]) == status["started_at"]
