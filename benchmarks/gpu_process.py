"""Child processes of `benchmarks/gpu.py`: each leads a group of its own, which ends with it."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from benchmarks.gpu_record import CUT, FAILED, NOT_RUN, ROOT, append, read, states

PR_SET_PDEATHSIG = 1
GRACE_S = 5.0
"""What a process has to end by itself once it is asked to."""
PAUSE_S = 0.05
_running: set[subprocess.Popen[Any]] = set()


def end_with_parent() -> None:
    """Ask the kernel to end this process when its parent ends, however that comes about."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def start(
    command: Sequence[str], log: Path, env: Mapping[str, str], *, talks: bool = False
) -> subprocess.Popen[Any]:
    """Start a child of this interpreter's; with `talks` it is asked and answers through pipes.

    From the main thread only: `end_with_parent` means the thread that started it.
    """
    with log.open("ab") as file:
        file.write(f"\n##### {' '.join(command)}\n".encode())
        file.flush()
        process = subprocess.Popen(
            [sys.executable, *command],
            cwd=ROOT,
            env={**os.environ, **env},
            stdin=subprocess.PIPE if talks else subprocess.DEVNULL,
            stdout=subprocess.PIPE if talks else file,
            stderr=file,
            start_new_session=True,
        )
    _running.add(process)
    return process


def stop(process: subprocess.Popen[Any], grace: float = GRACE_S) -> int:
    """End a child and all that it started; return its exit status."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(grace)
        except (ProcessLookupError, PermissionError, subprocess.TimeoutExpired):
            continue
    _running.discard(process)
    return process.wait()


def stop_all() -> None:
    """Kill every child that is still there."""
    for process in tuple(_running):
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
    for process in tuple(_running):
        stop(process)


def stop_on_signals() -> None:
    """End the children when this process is asked to end."""

    def leave(number: int, _frame: Any) -> None:
        stop_all()
        raise SystemExit(128 + number)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, leave)


def run_groups(
    part: str,
    groups: Sequence[Sequence[str]],
    command: Callable[[Sequence[str], float], Sequence[str]],
    *,
    out: Path,
    until: float,
    together: int,
    env: Mapping[str, str],
) -> None:
    """Run groups of pieces, a child each; one that dies is followed by another for what is left.

    Args:
        part: that the pieces belong to.
        groups: names of pieces.
        command: arguments of Python for some pieces, and the `time.monotonic()` until which.
        out: file of records; what children print goes to `log_of(out)`.
        until: when children are ended.
        together: how many at once.
        env: what is added to their environment.
    """
    waiting = deque([*group] for group in groups)
    running: dict[subprocess.Popen[Any], list[str]] = {}
    while waiting or running:
        while waiting and len(running) < together and time.monotonic() < until - 1:
            names = waiting.popleft()
            running[start(command(names, until - 1), log_of(out), env)] = names
        for process, names in tuple(running.items()):
            late = time.monotonic() > until
            if process.poll() is None and not late:
                continue
            del running[process]
            left = _close(part, names, stop(process), out, late=late)
            if left:
                waiting.appendleft(left)
        if waiting and not running and time.monotonic() >= until - 1:
            for name in (name for group in waiting for name in group):
                append(out, part=part, piece=name, state=NOT_RUN)
            return
        time.sleep(PAUSE_S)


def log_of(out: Path) -> Path:
    """Return where children's output goes."""
    return out.with_suffix(".log")


def _close(part: str, names: Sequence[str], status: int, out: Path, *, late: bool) -> list[str]:
    """Write down how the pieces of a child that ended stand; return what is still to be run."""
    found = states(read(out), part)
    left = [name for name in names if name not in found]
    lost = [name for name in names if found.get(name) == "began"]
    if status and not late and len(left) == len(names):  # it did not get as far as the first
        lost = left
    for name in lost:
        error = "time ran out" if late else f"the process ended with status {status}"
        append(out, part=part, piece=name, state=CUT if late else FAILED, error=error)
    return [name for name in left if name not in lost]
