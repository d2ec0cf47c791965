"""Report every series at 0 before the first request.

`increase()` of Prometheus misses the first match of a policy whose series begins at 1, and a guard
that counts nothing looks like one that sees nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

from saeguard.events.metrics import KINDS, Counts


def begin_counts(counts: Counts, closed: Iterable[tuple[str, Iterable[str]]]) -> None:
    """Begin the counters that do not name a policy.

    Args:
        counts: of an engine core.
        closed: counters and the values of their only label; none if they have no label.
    """
    for name, values in closed:
        known = list(values)
        for value in known:
            counts.begin(name, value)
        if not known:
            counts.begin(name)


def begin_policies(counts: Counts, policies: Iterable[Any], ever_enforced: Collection[str]) -> None:
    """Begin the counters of each policy: its verdicts and actions, in each mode that it may have.

    Args:
        counts: of an engine core.
        policies: of the watch list.
        ever_enforced: ids of shadow policies that are enforced for some requests.
    """
    for policy in policies:
        modes = {policy.mode, "enforce"} if policy.id in ever_enforced else {policy.mode}
        for mode, outcome in KINDS:
            if mode in modes:
                counts.begin("verdicts", policy.id, mode, outcome)
        if "enforce" in modes:
            counts.begin("actions", policy.id, "enforce", policy.action)
