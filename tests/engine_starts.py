"""Record how often the tests start a vLLM engine, and how long a start takes.

Whoever starts an engine appends one line to the file that `SAEGUARD_ENGINE_STARTS` names;
tests/conftest.py names it and prints the sum at the end of a run.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

FILE = "SAEGUARD_ENGINE_STARTS"


@dataclass(frozen=True)
class Start:
    """One start of an engine."""

    test: str
    """The test that started it, or the first of those that share it."""
    outcome: str
    """`ready`, `server ready` or `refused`."""
    seconds: float
    """From the start of its process until it could serve, or had ended."""


def record(outcome: str, seconds: float | None = None) -> None:
    """Append a start to the file; `seconds` defaults to the age of this process."""
    if not (path := os.environ.get(FILE)):
        return
    if seconds is None:
        seconds = time.time() - psutil.Process().create_time()
    test = os.environ.get("PYTEST_CURRENT_TEST", "").rsplit(" ", 1)[0]
    with Path(path).open("a") as file:
        file.write(json.dumps(asdict(Start(test, outcome, round(seconds, 2)))) + "\n")


def read(path: Path) -> list[Start]:
    """Return the starts of a file."""
    return [Start(**json.loads(line)) for line in path.read_text().splitlines()]
