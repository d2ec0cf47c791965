"""Run code that a model wrote, with its tests, in a process with limits.

The limits (processor time, memory, size of files, number of processes) keep a wrong program from
taking the machine. They are no sandbox: the code can read files and reach the network. Run it where
that does no harm.
"""

from __future__ import annotations

import resource
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Sequence

SECONDS = 5
"""Processor time of one program."""
WAIT = 60
"""Seconds on the clock: enough on a busy machine, for a program that sleeps too much."""
MEMORY = 1 << 30
"""Bytes of address space."""
PASSED = "every test passed"


def passes(code: str, tests: Sequence[str], seconds: int = SECONDS) -> bool:
    """Return whether `code` runs, and each of `tests` (statements, such as `assert`) after it.

    A line that is printed after the last test reports success, since code may end the process with
    exit code 0 before any test runs.
    """
    # The code's own output must not look like success: the line holds what it cannot know.
    secret = f"{PASSED} {secrets.token_hex(8)}"
    program = "\n".join([code, *tests, f"print({secret!r}, flush=True)"])
    return printed(program, seconds).rstrip("\n").endswith(secret)


def printed(program: str, seconds: int = SECONDS) -> str:
    """Return what a Python program prints; an empty text if it fails or exceeds a limit."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            done = subprocess.run(  # noqa: S603 - that it runs unknown code is its purpose
                [sys.executable, "-I", "-c", program],
                cwd=folder,
                env={"HOME": folder, "TMPDIR": folder, "PATH": "/usr/bin:/bin"},
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=WAIT,
                preexec_fn=lambda: _limit(seconds),
                check=False,
            )
        except (subprocess.TimeoutExpired, ValueError, OSError):  # a NUL in the code, too long
            return ""
    return "" if done.returncode else done.stdout.decode(errors="replace")


def _limit(seconds: int) -> None:
    for what, most in (
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_AS, MEMORY),
        (resource.RLIMIT_FSIZE, 1 << 20),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(what, (most, most))
