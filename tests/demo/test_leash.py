"""Nothing that the demo starts outlives it, however it ends."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from demo.leash import ROOT, leashed

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="vLLM runs on Linux")

FAMILY = """
import json, os, signal, subprocess, sys, time
if "stubborn" in sys.argv:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
sleep = [sys.executable, "-c", "import time; time.sleep(60)"]
child = subprocess.Popen(sleep, start_new_session="escaped" in sys.argv)
with open(sys.argv[1] + ".part", "w") as f:
    json.dump([os.getpid(), child.pid], f)
os.rename(sys.argv[1] + ".part", sys.argv[1])
time.sleep(60)
"""


def command(pids: Path, *flags: str) -> list[str]:
    """A process with a child, both of which say who they are and sleep."""
    return [sys.executable, "-c", FAMILY, str(pids), *flags]


def wait_for(condition: Callable[[], bool], seconds: float = 8.0) -> bool:
    """Wait until something holds."""
    until = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > until:
            return False
        time.sleep(0.02)
    return True


def alive(pid: int) -> bool:
    """Whether a process runs; the dead that nobody has reaped do not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"


def family(pids: Path) -> list[int]:
    """Wait for the processes to be there, and return their ids."""
    assert wait_for(pids.exists)
    found: list[int] = json.loads(pids.read_text(encoding="utf-8"))
    assert all(map(alive, found))
    return found


def gone(pids: list[int]) -> bool:
    """Whether all of them end within seconds."""
    return wait_for(lambda: not any(map(alive, pids)))


@pytest.fixture
def log(tmp_path: Path) -> io.BufferedWriter:
    """A file for the output."""
    return (tmp_path / "log").open("wb")


@pytest.mark.parametrize("flag", ["plain", "escaped", "stubborn"])
def test_the_block_ends_the_whole_family(tmp_path: Path, log: io.BufferedWriter, flag: str) -> None:
    """Children, those in sessions of their own, and those that ignore SIGTERM."""
    with leashed(command(tmp_path / "pids", flag), log, grace=0.3):
        pids = family(tmp_path / "pids")
    assert gone(pids)


def test_an_interrupt_ends_the_family(tmp_path: Path, log: io.BufferedWriter) -> None:
    """Ctrl-C inside the block."""
    pids: list[int] = []

    def interrupted() -> None:
        with leashed(command(tmp_path / "pids"), log):
            pids.extend(family(tmp_path / "pids"))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert gone(pids)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGHUP])
def test_a_killed_parent_leaves_nothing(tmp_path: Path, number: int) -> None:
    """Even SIGKILL, which no handler sees, closes the pipe."""
    code = (
        "import sys, time\nfrom demo.leash import leashed\n"
        "with open(sys.argv[1], 'wb') as log, leashed(sys.argv[2:], log): time.sleep(60)"
    )
    pids_file = tmp_path / "pids"
    parent = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "log"), *command(pids_file)], cwd=ROOT
    )
    pids = family(pids_file)
    parent.send_signal(number)
    parent.wait()
    assert gone(pids)


def test_a_killed_leash_takes_the_command_along(tmp_path: Path, log: io.BufferedWriter) -> None:
    """Linux sends the command SIGTERM when its leash dies."""
    with leashed(command(tmp_path / "pids"), log) as leash:
        pids = family(tmp_path / "pids")
        leash.kill()
        assert gone(pids[:1])
    os.kill(pids[1], signal.SIGKILL)


def test_the_status_is_the_commands(log: io.BufferedWriter) -> None:
    """A server that dies while it starts is seen at once."""
    with leashed([sys.executable, "-c", "import sys; sys.exit(7)"], log) as leash:
        assert leash.wait(10) == 7
