"""Run a command that cannot outlive its parent: `python -m demo.leash SECONDS COMMAND...`.

The command gets a process group of its own. The leash ends all of it when the command exits, on
SIGTERM, or when its standard input closes, which happens however the parent died, SIGKILL
included. Should the leash itself be killed, Linux sends the command SIGTERM.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

GRACE = 10.0
"""Seconds between SIGTERM and SIGKILL."""
TICK = 0.1

SET_PDEATHSIG, SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h
ROOT = Path(__file__).resolve().parent.parent


@contextmanager
def leashed(
    command: Sequence[str],
    log: IO[bytes],
    env: Mapping[str, str] | None = None,
    grace: float = GRACE,
) -> Iterator[subprocess.Popen[bytes]]:
    """Run `command` on a leash while the block runs; its output goes to `log`.

    The process yielded is the leash: it exits when the command does, with its status.
    """
    leash = subprocess.Popen(
        [sys.executable, "-m", "demo.leash", str(grace), *command],
        stdin=subprocess.PIPE,
        stdout=log,
        stderr=subprocess.STDOUT,
        env=env,
        cwd=ROOT,
        start_new_session=True,  # Ctrl-C at the terminal reaches us only, and we end the group
    )
    try:
        yield leash
    finally:
        assert leash.stdin is not None
        with contextlib.suppress(OSError):
            leash.stdin.close()
        try:
            leash.wait(grace + 10)
        except BaseException:
            leash.kill()
            leash.wait()
            raise


def main(command: Sequence[str], grace: float) -> int:
    """Run `command`, end what it leaves behind, and return its status.

    Args:
        command: program and arguments.
        grace: seconds between SIGTERM and SIGKILL.
    """
    stopped: list[int] = []
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(number, lambda got, _frame: stopped.append(got))
    _prctl(SET_CHILD_SUBREAPER, 1)  # orphans become ours, to be reaped and found
    me = os.getpid()

    def follow() -> None:
        _prctl(SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != me:  # the leash died before the line above
            os._exit(1)

    child = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        preexec_fn=follow,  # noqa: PLW1509
    )
    status: int | None = None
    while status is None and not stopped and not _closed(sys.stdin.fileno()):
        status = _reap(child.pid)
    ended = _end(child.pid, grace)
    child.returncode = status if status is not None else ended
    return child.returncode if child.returncode is not None else 1


def _closed(descriptor: int) -> bool:
    """Wait a moment; return whether the other end of the pipe is gone."""
    readable, _, _ = select.select([descriptor], [], [], TICK)
    return bool(readable) and not os.read(descriptor, 4096)


def _reap(leader: int) -> int | None:
    """Reap every dead child; return the leader's exit status if it was among them."""
    found = None
    with contextlib.suppress(ChildProcessError):
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                break
            if pid == leader:
                found = os.waitstatus_to_exitcode(status)
    return found


def _end(leader: int, grace: float) -> int | None:
    """End the group, then what has left it; return the leader's status if it died here."""
    status = None
    with contextlib.suppress(ProcessLookupError):
        os.killpg(leader, signal.SIGTERM)
    until = time.monotonic() + grace
    while children := _children():
        if time.monotonic() > until:
            for pid in children:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        found = _reap(leader)
        status = found if found is not None else status
        time.sleep(TICK / 2)
    return status


def _children() -> list[int]:
    """Return the processes whose parent we are, dead ones included."""
    listing = Path(f"/proc/self/task/{os.getpid()}/children")
    return [int(pid) for pid in listing.read_text(encoding="ascii").split()]


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


if __name__ == "__main__":
    code = main(sys.argv[2:], float(sys.argv[1]))
    sys.exit(code if code >= 0 else 128 - code)
