"""Write the events of one engine core, and keep its running totals."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, get_args

import structlog

from saeguard.events.first_counts import begin_counts, begin_policies
from saeguard.events.metrics import Counts
from saeguard.events.records import (
    coverage_record,
    ended_events,
    mismatch_event,
    reload_event,
)
from saeguard.events.sink import Sink
from saeguard.guard.request_verdicts import Verdicts
from saeguard.guard.verdict import Coverage, Reason, balanced
from saeguard.guard.watchlist import WatchList
from saeguard.reload.reload_state import OUTCOMES, ReloadStatus, Report
from saeguard.vllm.settings import Settings

log = structlog.get_logger("saeguard")

REPORT_S = 1.0
"""Least seconds between reports of the running totals while requests are in flight."""
COUNTERS: Mapping[str, tuple[str, ...]] = {
    "requests": (),
    "tokens": ("evaluated", *get_args(Reason)),
    "ledger_mismatches": (),
    "events": ("produced", "written", "dropped"),
    "unread_passes": (),
    "reloads": OUTCOMES,
    "refusals": (),
    "prefix_store_dropped": (),
}
"""Counters that do not name a policy, with the values of their label."""


class Telemetry:
    """Writes one engine core's events, and keeps totals for the API server's metrics."""

    def __init__(self, settings: Settings, model: str, engine: int = 0) -> None:
        """Open the event log if one is configured.

        Args:
            settings: the operator's.
            model: name that the model is served under.
            engine: index of the engine core among those of the server.
        """
        self.model = model
        self.engine = str(engine)
        self.sink = (
            Sink(Path(settings.events), capacity=settings.event_queue) if settings.events else None
        )
        self.every_verdict = settings.event_lines == "all"
        self.counts = Counts()
        self._reported = -REPORT_S
        """When running totals were last reported."""
        self._begun: WatchList | None = None
        """The watch list whose counters were begun last."""
        import vllm

        begin_counts(self.counts, COUNTERS.items())
        self.counts.gauge("build_info", metadata.version("saeguard"), vllm.__version__, value=1)

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
        difference = fields.pop("difference")
        (log.info if report.error is None else log.error)(
            "saeguard policy.reload", **fields, difference=report.difference.in_words()
        )
        if report.difference.no_longer_enforced:
            log.warning(
                "saeguard: policies that were enforced are not enforced any more",
                policies=list(report.difference.no_longer_enforced),
            )
        self._put(partial(reload_event, {**fields, **difference}, model=self.model))

    def _put(self, build: Callable[[], Mapping[str, Any]]) -> None:
        if self.sink is not None:
            self.sink.put(build)

    def changed_totals(
        self,
        *,
        busy: bool,
        unread_passes: int,
        dropped: int | None,
        reloads: ReloadStatus | None,
        watchlist: WatchList,
        ever_enforced: Callable[[Iterable[str]], frozenset[str]],
    ) -> list[list[Any]]:
        """Return the changes of the running totals since the last report, for `/metrics`.

        With many policies, every request changes many totals. So they are reported at most once in
        `REPORT_S`, and always by the last of the requests in flight.

        Args:
            busy: whether further requests are in flight.
            unread_passes: number of forward passes so far that were lost or that no tap read.
            dropped: entries that the prefix store has dropped so far; None without a store.
            reloads: the state of reloading; None without it.
            watchlist: the current one.
            ever_enforced: returns which policies are enforced for some request, whatever their
                mode.
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
        if watchlist is not self._begun:
            self._begun = watchlist
            enforced = ever_enforced(p.id for p in watchlist.policies)
            begin_policies(self.counts, watchlist.policies, enforced)
        self._set_gauges(watchlist, reloads)
        return self.counts.take()

    def _set_gauges(self, watchlist: WatchList, reloads: ReloadStatus | None) -> None:
        engine, gauge = self.engine, self.counts.gauge
        gauge("report_timestamp_seconds", engine, value=round(time.time(), 3))
        if reloads is not None:
            gauge("policies_current", engine, value=int(reloads.in_use))
            only = reloads.compared_only is not None
            gauge("policies_compared_only", engine, value=int(only))
        modes = Counter(policy.mode for policy in watchlist.policies)
        for mode in ("shadow", "enforce"):
            gauge("policies", engine, mode, value=modes[mode])

    def close(self) -> None:
        """Write the events that are still queued."""
        if self.sink is not None:
            self.sink.close()
