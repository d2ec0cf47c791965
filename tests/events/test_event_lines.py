"""What a request that ended leaves in the event log, by the setting `event_lines`."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from saeguard.events.reader import read_log
from saeguard.events.record_schema import Event, Request
from saeguard.guard.judge import judge_text
from saeguard.guard.request_verdicts import Verdicts
from saeguard.policy.types import Name, Selection
from saeguard.vllm.engine_core.telemetry import Telemetry
from saeguard.vllm.settings import parse_settings
from tests.guard.watchlists import make_policy, make_watchlist

QUIET = 7


def found(*values: float) -> Verdicts:
    """Return the verdicts of eight policies, of which the first matches above 0.5."""
    above = [0.5, *[50.0] * QUIET]
    watchlist = make_watchlist(
        [make_policy(f"p{i}", Name("a"), {"a": Selection("f0", x)}) for i, x in enumerate(above)]
    )
    shares = np.array(values, np.float64)[:, None].repeat(len(watchlist.features), axis=1)
    return judge_text(watchlist.rules, shares, np.ones(len(values), bool), 1)


def log_of(path: Path, verdicts: Verdicts, **settings: Any) -> list[dict[str, Any]]:
    """End one request, and return its lines."""
    telemetry = Telemetry(parse_settings({"policies": "p", "events": str(path), **settings}), "m")
    about = {"request_id": "r", "watchlist": "0" * 64, "tenant": None}
    telemetry.request_ended(verdicts, verdicts.coverage, "stop", about)
    telemetry.close()
    assert telemetry.sink is not None
    assert (telemetry.sink.produced, telemetry.sink.dropped) == (telemetry.sink.written, 0)
    return list(map(json.loads, path.read_text().splitlines()))


@pytest.mark.parametrize(("values", "lines"), [((0.0, 0.0), 0), ((0.0, 9.0), 1)])
def test_a_line_for_what_was_found(tmp_path: Path, values: tuple[float, ...], lines: int) -> None:
    """By default a quiet request leaves one line, however many policies are loaded."""
    verdicts = found(*values)
    few = log_of(tmp_path / "few", verdicts)
    every = log_of(tmp_path / "all", verdicts, event_lines="all")

    assert [e["event"] for e in few] == ["verdict"] * lines + ["request"]
    assert [e["event"] for e in every] == ["verdict"] * (1 + QUIET) + ["request"]
    for log in (few, every):
        assert log[-1]["verdicts"] == Counter(v.outcome for v in verdicts)
        assert log[-1]["coverage"]["tokens"] == len(values)


def test_the_reader_reads_both_logs(tmp_path: Path) -> None:
    """Verdicts and requests, in the order of their lines."""
    verdicts = found(0.0, 0.0)
    log_of(tmp_path / "few", verdicts)
    log_of(tmp_path / "all", verdicts, event_lines="all")

    assert [type(e) for e in read_log(tmp_path / "few")] == [Request]
    assert [type(e) for e in read_log(tmp_path / "all")] == [Event] * (1 + QUIET) + [Request]


def test_another_word_is_refused(tmp_path: Path) -> None:
    """With the key, what was found and what is allowed."""
    with pytest.raises(ValueError, match=r"saeguard.event_lines: .*'matches' or 'all'.*'some'"):
        log_of(tmp_path / "few", found(0.0), event_lines="some")
