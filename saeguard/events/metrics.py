"""Count totals beside the scheduler, and show them in the API server's `/metrics`.

`/metrics` does not show counters of the engine core's process. So the counts since the last report
travel with the output of a request that ends, to the API server of that request, which adds them
to its own Prometheus counters. Sums over API servers are right.
"""

from __future__ import annotations

from collections import Counter
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
GAUGES: dict[str, str] = {
    "policies_current": "1 while the policies of the files are in use; 0 after a refused reload.",
}
"""Prometheus gauges `saeguard_<name>`: help text."""


class Counts:
    """Totals that changed since `take` was called last."""

    def __init__(self) -> None:
        """Start at zero."""
        self._new: Counter[tuple[str, ...]] = Counter()
        self._alike: dict[tuple[Any, ...], tuple[Any, list[int]]] = {}
        """Requests whose verdicts differ in unusual ones only: one of them, and their number."""
        self._seen: Counter[tuple[str, ...]] = Counter()
        self._stands: dict[str, int] = {}
        self._changed: dict[str, int] = {}

    def request(self, verdicts: Any, coverage: Any) -> None:
        """Count a request that ended, by its `Verdicts` and its own `Coverage`."""
        self.add("requests")
        self.add("tokens", "evaluated", n=coverage.evaluated)
        for reason, n in coverage.skipped.items():
            self.add("tokens", reason, n=n)
        # The arrays of one decision are shared by its requests, and kept here: ids are not reused.
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
            self._new[name, *labels] += n

    def total(self, name: str, *labels: str, n: int) -> None:
        """Set a total that another object counts."""
        key = (name, *labels)
        self.add(*key, n=n - self._seen[key])
        self._seen[key] = n

    def gauge(self, name: str, value: int) -> None:
        """Set a gauge; it is reported if it differs from the last report."""
        if self._stands.get(name) != value:
            self._stands[name] = self._changed[name] = value

    def take(self) -> list[list[Any]]:
        """Return `[name, *labels, n]` for everything that changed, and start at zero."""
        for verdicts, (n,) in self._alike.values():
            policies = verdicts.rules.policies
            kinds = verdicts.expected_kinds().tolist()
            for i, kind in zip(verdicts.which.tolist(), kinds, strict=True):
                self.add("verdicts", policies[i].id, *KINDS[kind], n=n)
        self._alike.clear()
        taken = [[*key, n] for key, n in self._new.items() if n]
        taken += [[name, value] for name, value in self._changed.items()]
        self._new.clear()
        self._changed.clear()
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

    return Gauge(f"saeguard_{name}", GAUGES[name], multiprocess_mode="mostrecent")


def show(counts: Iterable[Sequence[Any]]) -> None:
    """Add the counts of an engine core to this process' Prometheus counters."""
    for name, *labels, n in counts:
        if name in GAUGES:
            _gauge(name).set(n)
            continue
        _child(name, *labels).inc(n)
