"""Running totals: counted beside the scheduler, shown by the API server's `/metrics`.

A counter made in the engine's process does not show there. So what was counted since the last
time rides with a request that ends, to whichever API server that request belongs to, and
is added to that process' Prometheus counters. Sums over API servers are right.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any

import numpy as np

METRICS: dict[str, tuple[str, tuple[str, ...]]] = {
    "requests": ("Requests that ended under guard.", ()),
    "tokens": ("Tokens of ended requests, evaluated or by the reason why not.", ("state",)),
    "verdicts": (
        "Verdicts of ended requests, by what was concluded.",
        ("policy", "mode", "verdict"),
    ),
    "actions": ("Actions taken.", ("policy", "mode", "action")),
    "ledger_mismatches": ("Requests whose tokens are not all accounted for; must stay 0.", ()),
    "events": ("Events by what became of them; the difference is queued.", ("state",)),
    "unread_passes": ("Forward passes of which nothing reached the rules.", ()),
    "reloads": ("Readings of the policy files, by what became of them.", ("outcome",)),
    "refusals": ("Requests refused because they asked the guard for what they may not have.", ()),
    "memory_dropped": ("Cached blocks whose activations were let go for want of room.", ()),
}
"""Prometheus counters `saeguard_<name>_total`: help text and labels."""
KINDS = tuple(
    (mode, outcome)
    for mode in ("shadow", "enforce")
    for outcome in ("match", "no_match", "error", "not_evaluated")
)
"""Of verdicts, in the order in which `Verdicts.tally` numbers them."""
GAUGES: dict[str, str] = {
    "policies_current": "1 while what the policy files hold is in use, 0 from a refused reload on.",
}
"""Prometheus gauges `saeguard_<name>`: help text."""


class Counts:
    """What was counted since it was last taken."""

    def __init__(self) -> None:
        """Start at nothing."""
        self._new: Counter[tuple[str, ...]] = Counter()
        self._verdicts: dict[int, tuple[Any, np.ndarray]] = {}
        """By list of policies: the list, and how many verdicts of each [policies, kinds]."""
        self._seen: Counter[tuple[str, ...]] = Counter()
        self._stands: dict[str, int] = {}
        self._changed: dict[str, int] = {}

    def request(self, verdicts: Any, coverage: Any) -> None:
        """Count a request that ended, by its `Verdicts` and its own `Coverage`."""
        self.add("requests")
        self.add("tokens", "evaluated", n=coverage.evaluated)
        for reason, n in coverage.skipped.items():
            self.add("tokens", reason, n=n)
        policies = verdicts.rules.policies
        which, kind = verdicts.tally()
        found = self._verdicts.get(id(policies))
        if found is None:
            empty = np.zeros((len(policies), len(KINDS)), np.int64)
            found = self._verdicts[id(policies)] = policies, empty
        found[1][which, kind] += 1
        for v in verdicts.acting():
            self.add("actions", v.policy, v.mode, v.acted)

    def add(self, name: str, *labels: str, n: int = 1) -> None:
        """Count `n` more."""
        if n:
            self._new[name, *labels] += n

    def total(self, name: str, *labels: str, n: int) -> None:
        """Tell a total that somebody else keeps."""
        key = (name, *labels)
        self.add(*key, n=n - self._seen[key])
        self._seen[key] = n

    def gauge(self, name: str, value: int) -> None:
        """Tell how something stands, where it has changed since it was told last."""
        if self._stands.get(name) != value:
            self._stands[name] = self._changed[name] = value

    def take(self) -> list[list[Any]]:
        """Return `[name, *labels, n]` of what moved, and start anew."""
        for policies, numbers in self._verdicts.values():
            for i, kind in np.argwhere(numbers).tolist():
                self.add("verdicts", policies[i].id, *KINDS[kind], n=int(numbers[i, kind]))
        self._verdicts.clear()
        taken = [[*key, n] for key, n in self._new.items()]
        taken += [[name, value] for name, value in self._changed.items()]
        self._new.clear()
        self._changed.clear()
        return taken


@cache
def _counter(name: str) -> Any:
    # Where metrics are shown, vLLM has loaded it; the engine's own process never needs it.
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

    return Gauge(f"saeguard_{name}", GAUGES[name], multiprocess_mode="mostrecent")


def show(counts: Iterable[Sequence[Any]]) -> None:
    """Add what an engine counted to this process' Prometheus counters."""
    for name, *labels, n in counts:
        if name in GAUGES:
            _gauge(name).set(n)
            continue
        _child(name, *labels).inc(n)
