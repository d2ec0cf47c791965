"""Write the events of one engine core, and keep its running totals."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import structlog

from saeguard.events.metrics import Counts
from saeguard.events.records import (
    coverage_record,
    ended_events,
    mismatch_event,
    reload_event,
)
from saeguard.events.sink import Sink
from saeguard.guard.request_verdicts import Verdicts
from saeguard.guard.verdict import Coverage, balanced
from saeguard.reload.reload_state import ReloadStatus, Report
from saeguard.vllm.settings import Settings

log = structlog.get_logger("saeguard")

REPORT_S = 1.0
"""Least seconds between reports of the running totals while requests are in flight."""


class Telemetry:
    """Writes one engine core's events, and keeps totals for the API server's metrics."""

    def __init__(self, settings: Settings, model: str) -> None:
        """Open the event log if one is configured."""
        self.model = model
        self.sink = (
            Sink(Path(settings.events), capacity=settings.event_queue) if settings.events else None
        )
        self.every_verdict = settings.event_lines == "all"
        self.counts = Counts()
        self._reported = -REPORT_S
        """When running totals were last reported."""

    def request_ended(
        self, verdicts: Verdicts, coverage: Coverage, reason: str, about: Mapping[str, Any]
    ) -> None:
        """Count a request and write its events.

        Args:
            verdicts: of the request.
            coverage: of the request.
            reason: why it ended.
            about: fields of every event: request, tenant and watch list.
        """
        about = {**about, "model": self.model}
        self.counts.request(verdicts, coverage)
        if not (balanced(coverage) and verdicts.balanced()):
            self.counts.add("ledger_mismatches")
            log.error(
                "saeguard ledger does not balance",
                request_id=about["request_id"],
                **coverage_record(coverage),
            )
            self._put(partial(mismatch_event, coverage, **about, finished=reason))
        if self.sink is not None:
            policies = None if self.every_verdict else verdicts.telling()
            events = partial(ended_events, verdicts, policies, **about, finished=reason)
            self.sink.put_all(events, 1 + len(verdicts if policies is None else policies))

    def reloaded(self, report: Report) -> None:
        """Log a reload and write its event; the reloader's thread calls this."""
        fields = asdict(report)
        (log.info if report.error is None else log.error)("saeguard policy.reload", **fields)
        self._put(partial(reload_event, fields, model=self.model))

    def _put(self, build: Callable[[], Mapping[str, Any]]) -> None:
        if self.sink is not None:
            self.sink.put(build)

    def changed_totals(
        self, *, busy: bool, unread_passes: int, dropped: int | None, reloads: ReloadStatus | None
    ) -> list[list[Any]]:
        """Return the changes of the running totals since the last report, for `/metrics`.

        With many policies, every request changes many totals. So they are reported at most once in
        `REPORT_S`, and always by the last of the requests in flight.

        Args:
            busy: whether further requests are in flight.
            unread_passes: number of forward passes so far that were lost or that no tap read.
            dropped: entries that the prefix store has dropped so far; None without a store.
            reloads: the state of reloading; None without it.
        """
        now = time.monotonic()
        if busy and now - self._reported < REPORT_S:
            return []
        self._reported = now
        if self.sink is not None:
            for state in ("produced", "written", "dropped"):
                self.counts.total("events", state, n=getattr(self.sink, state))
        if dropped is not None:
            self.counts.total("prefix_store_dropped", n=dropped)
        self.counts.total("unread_passes", n=unread_passes)
        if reloads is not None:
            for outcome, n in list(reloads.outcomes.items()):
                self.counts.total("reloads", outcome, n=n)
            self.counts.gauge("policies_current", int(reloads.current))
        return self.counts.take()

    def close(self) -> None:
        """Write the events that are still queued."""
        if self.sink is not None:
            self.sink.close()
