"""The report at the end of a test run: the slowest tests, and every start of an engine."""

from __future__ import annotations

import os
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests import engine_starts

SLOWEST = 50
"""Tests that the report lists."""


@dataclass
class Cost:
    """What one test, with the fixtures made for it, took."""

    wall: float = 0.0
    cpu: float = 0.0
    """User and system seconds of the process that ran it, and of its children that have ended."""


class Meter:
    """Adds the CPU time of each phase to its report, in whichever process the test runs."""

    def __init__(self) -> None:
        self.used = 0.0

    def pytest_runtest_logstart(self) -> None:
        """Begin a test."""
        self.used = _cpu()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self) -> Iterator[Any]:
        """End a phase; xdist carries the report's attributes to the main process."""
        report = yield
        now = _cpu()
        report.cpu, self.used = now - self.used, now
        return report


def _cpu() -> float:
    spent = os.times()
    return spent.user + spent.system + spent.children_user + spent.children_system


class Summary:
    """Adds up what the tests took and prints it; lives in the main process."""

    def __init__(self) -> None:
        self.costs: dict[str, Cost] = defaultdict(Cost)
        self.starts = Path(tempfile.mkdtemp(prefix="saeguard-tests-")) / "starts.jsonl"
        self.starts.touch()
        os.environ[engine_starts.FILE] = str(self.starts)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Add one phase of one test."""
        cost = self.costs[report.nodeid]
        cost.wall += report.duration
        cost.cpu += getattr(report, "cpu", 0.0)

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Print the slowest tests, the files by CPU time, and the engine starts."""
        if len(self.costs) < SLOWEST:
            return
        write, section = terminalreporter.write_line, terminalreporter.section
        started = engine_starts.read(self.starts)
        engines = Counter(start.test for start in started)
        section(f"slowest {SLOWEST} tests")
        write("  wall s   CPU s  engines  test")
        slowest = sorted(self.costs.items(), key=lambda item: -item[1].wall)[:SLOWEST]
        for test, cost in slowest:
            write(f"{cost.wall:8.1f}{cost.cpu:8.1f}{engines[test] or '':>9}  {test}")
        section("folders")
        folders: dict[str, Cost] = defaultdict(Cost)
        for test, cost in self.costs.items():
            folder = folders[test.partition("::")[0].rsplit("/", 1)[0]]
            folder.wall += cost.wall
            folder.cpu += cost.cpu
        write("  wall s   CPU s  folder")
        for name, cost in sorted(folders.items(), key=lambda item: -item[1].wall):
            write(f"{cost.wall:8.1f}{cost.cpu:8.1f}  {name}")
        section("engine starts")
        for outcome in sorted({start.outcome for start in started}):
            seconds = [start.seconds for start in started if start.outcome == outcome]
            write(
                f"{len(seconds):4} {outcome}, {sum(seconds):.0f} s in all, "
                f"{min(seconds):.1f} to {max(seconds):.1f} s each"
            )
