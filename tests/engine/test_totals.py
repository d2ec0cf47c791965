"""Running totals that cannot be reported are logged once for each reason, and tried again."""

from __future__ import annotations

import queue
from types import SimpleNamespace
from typing import Any

import pytest

from saeguard.vllm.engine_core import totals


class Failing:
    """An engine's guard, as far as the thread of totals knows it, whose counts fail in turn."""

    def __init__(self, *outcomes: Exception | None) -> None:
        self.left = list(outcomes)

    @property
    def closed(self) -> bool:
        """Whether nothing is left to try."""
        return not self.left

    def changed_totals(self, *, at_once: bool) -> list[Any]:
        """Raise, or return no change."""
        assert at_once
        if (error := self.left.pop(0)) is not None:
            raise error
        return []


def test_a_failure_is_logged_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same reason again is silent, until a report has succeeded or the reason changes."""
    logged: list[str] = []
    monkeypatch.setattr(totals, "log", SimpleNamespace(exception=logged.append))
    monkeypatch.setattr(totals, "EVERY_S", 0)
    same, other = OSError("full"), OSError("gone")
    for outcomes, lines, reports in (
        ((same, same, same), 1, 0),
        ((same, None, same), 2, 1),
        ((same, other, other), 2, 0),
    ):
        logged.clear()
        sent: queue.Queue[Any] = queue.Queue()
        totals._run(sent, Failing(*outcomes))  # type: ignore[arg-type]
        assert (len(logged), sent.qsize()) == (lines, reports)
