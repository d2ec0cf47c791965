"""Count totals beside the scheduler, and show them in the API server's `/metrics`.

`/metrics` does not show counters of the engine core's process. So the counts since the last report
travel to an API server, which adds them to its own Prometheus counters: with the output of a
request that ends, and otherwise once a second. Sums over API servers are right.
"""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any

METRICS: dict[str, tuple[str, tuple[str, ...]]] = {
    "requests": ("Requests that ended under the guard.", ()),
    "tokens": ("Tokens of ended requests: evaluated, or the reason why not.", ("state",)),
    "verdicts": (
        "Verdicts on ended requests.",
        ("policy", "mode", "verdict"),
    ),
    "actions": ("Actions taken.", ("policy", "mode", "action")),
    "ledger_mismatches": ("Requests whose coverage does not add up; must stay 0.", ()),
    "events": ("Events produced, written and dropped; the others are queued.", ("state",)),
    "unread_passes": ("Forward passes that brought nothing to the rules.", ()),
    "reloads": ("Reloads of the policy files, by outcome.", ("outcome",)),
    "refusals": ("Requests refused for what they asked of the guard.", ()),
    "prefix_store_dropped": ("Cached blocks that the prefix store had no room for.", ()),
}
"""Prometheus counters `saeguard_<name>_total`: help text and labels."""
KINDS = tuple(
    (mode, outcome)
    for mode in ("shadow", "enforce")
    for outcome in ("match", "no_match", "error", "not_evaluated")
)
"""Kinds of verdicts, in the order in which `Verdicts.unusual` numbers them."""
GAUGES: dict[str, tuple[str, tuple[str, ...]]] = {
    "policies_current": (
        "1 while the policies of the files are in use; 0 if they were refused or cannot be read.",
        ("engine",),
    ),
    "policies_compared_only": (
        "1 while the system reports no changes of the policy files, so that they are compared.",
        ("engine",),
    ),
    "policies": ("Policies in use.", ("engine", "mode")),
    "report_timestamp_seconds": ("When an engine core last reported, Unix time.", ("engine",)),
    "build_info": ("Versions; always 1.", ("version", "vllm")),
}
"""Prometheus gauges `saeguard_<name>`: help text and labels."""
HISTOGRAMS: dict[str, tuple[str, tuple[float, ...]]] = {
    "step_seconds": (
        "Time of the guard's own work in one engine step, beside the scheduler.",
        (1e-5, 2.5e-5, 5e-5, 1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 1e-2, 2.5e-2, 0.1, 1.0),
    ),
}
"""Prometheus histograms `saeguard_<name>`: help text and buckets in seconds."""
MOST_VALUES = 4096
"""Values of a histogram that wait for a report; of more, the latest count."""


class Counts:
    """Totals that changed since `take` was called last."""

    def __init__(self) -> None:
        """Start at zero."""
        self._new: Counter[tuple[str, ...]] = Counter()
        self._begun: set[tuple[str, ...]] = set()
        """Counters that are reported next time, even at 0."""
        self._alike: dict[tuple[Any, ...], tuple[Any, list[int]]] = {}
        """Requests whose verdicts differ in unusual ones only: one of them, and their number."""
        self._seen: Counter[tuple[str, ...]] = Counter()
        self._stands: dict[tuple[str, ...], float] = {}
        self._changed: dict[tuple[str, ...], float] = {}
        self._values: dict[str, deque[float]] = {}
        self._lock = threading.RLock()
        """The engine core counts, and a thread of its own reports."""

    def request(self, verdicts: Any, coverage: Any) -> None:
        """Count a request that ended, by its `Verdicts` and its own `Coverage`."""
        with self._lock:
            self.add("requests")
            self.add("tokens", "evaluated", n=coverage.evaluated)
            for reason, n in coverage.skipped.items():
                self.add("tokens", reason, n=n)
            # The arrays of one decision are shared by its requests. They are kept here, so ids are
            # not reused.
            alike = id(verdicts.rules), id(verdicts.which), verdicts.base
            self._alike.setdefault(alike, (verdicts, [0]))[1][0] += 1
            for i, expected, kind in verdicts.unusual():
                policy = verdicts.rules.policies[i].id
                self.add("verdicts", policy, *KINDS[expected], n=-1)
                self.add("verdicts", policy, *KINDS[kind])
            for v in verdicts.acting():
                self.add("actions", v.policy, v.mode, v.acted)

    def add(self, name: str, *labels: str, n: int = 1) -> None:
        """Count `n` more."""
        if n:
            with self._lock:
                self._new[name, *labels] += n

    def begin(self, name: str, *labels: str) -> None:
        """Have a counter reported at 0, so that its first increase is seen as one."""
        with self._lock:
            self._begun.add((name, *labels))
            self._new[name, *labels] += 0

    def total(self, name: str, *labels: str, n: int) -> None:
        """Set a total that another object counts."""
        key = (name, *labels)
        with self._lock:
            self.add(*key, n=n - self._seen[key])
            self._seen[key] = n

    def gauge(self, name: str, *labels: str, value: float) -> None:
        """Set a gauge; it is reported if it differs from the last report."""
        key = (name, *labels)
        with self._lock:
            if self._stands.get(key) != value:
                self._stands[key] = self._changed[key] = value

    def observe(self, name: str, value: float) -> None:
        """Add a value to a histogram."""
        with self._lock:
            self._values.setdefault(name, deque(maxlen=MOST_VALUES)).append(value)

    def take(self) -> list[list[Any]]:
        """Return `[name, *labels, n]` for everything that changed, and start at zero.

        `n` is the increase of a counter, the value of a gauge, or the values of a histogram.
        """
        with self._lock:
            for verdicts, (n,) in self._alike.values():
                policies = verdicts.rules.policies
                kinds = verdicts.expected_kinds().tolist()
                for i, kind in zip(verdicts.which.tolist(), kinds, strict=True):
                    self.add("verdicts", policies[i].id, *KINDS[kind], n=n)
            taken: list[list[Any]] = [
                [*key, n] for key, n in self._new.items() if n or key in self._begun
            ]
            taken += [[*key, value] for key, value in self._changed.items()]
            taken += [[name, list(values)] for name, values in self._values.items()]
            for kept in (self._alike, self._new, self._begun, self._changed, self._values):
                kept.clear()
        return taken


@cache
def _counter(name: str) -> Any:
    # vLLM has imported it in the API server; the engine core's process never needs it.
    from prometheus_client import Counter as Metric  # noqa: PLC0415

    text, labels = METRICS[name]
    return Metric(f"saeguard_{name}", text, labels)


@cache
def _child(name: str, *labels: str) -> Any:
    metric = _counter(name)
    return metric.labels(*labels) if labels else metric


@cache
def _gauge(name: str) -> Any:
    from prometheus_client import Gauge  # noqa: PLC0415 - as above

    text, labels = GAUGES[name]
    return Gauge(f"saeguard_{name}", text, labels, multiprocess_mode="mostrecent")


@cache
def _histogram(name: str) -> Any:
    from prometheus_client import Histogram  # noqa: PLC0415 - as above

    text, buckets = HISTOGRAMS[name]
    return Histogram(f"saeguard_{name}", text, buckets=buckets)


def show(counts: Iterable[Sequence[Any]]) -> None:
    """Add the counts of an engine core to this process' Prometheus counters."""
    for name, *labels, n in counts:
        if name in GAUGES:
            _gauge(name).labels(*labels).set(n)
        elif name in HISTOGRAMS:
            for value in n:
                _histogram(name).observe(value)
        else:
            _child(name, *labels).inc(n)
