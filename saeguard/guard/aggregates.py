"""Aggregate a feature's shares over several tokens, for selections with `over`."""

from __future__ import annotations

from typing import Any

import numpy as np

from saeguard.guard.compiled import compiled
from saeguard.guard.tables import AVERAGE, FADED, FOREVER, MEAN, PEAK, WHOLE, Tables


@compiled
def aggregate(rules: Tables, s: Any, slot: int, trace: int, t: int, value: float) -> float:
    """Add a token's share to an aggregate; return the aggregate at this token."""
    rule = rules.traces[trace]
    mine = s.aggregates[slot, rule["aggregate"]]
    before = s.scopes[slot, rule["scope"]]["looked"]
    kind, rest = rule["kind"], rule["rest"]
    level = mine["level"]
    if kind == AVERAGE:
        if level != 0:
            for _ in range(mine["at"] + 1, t):  # tokens that count as 0
                level *= rule["decay"]
        level = rule["decay"] * level + (1 - rule["decay"]) * value
        if abs(level) < FADED:
            level = 0.0
        mine["at"] = t
    elif kind == PEAK:
        if mine["kept"] == 0:
            level = rest if before > 0 else value
        mine["kept"] += 1
        level = max(level, value)
    elif kind == WHOLE:
        level += value
    else:
        return of_window(rules, s, slot, trace, t, value)
    mine["level"] = level
    mine["restless"] = t if level == (rest if kind == PEAK else 0.0) else FOREVER
    return level / (before + 1) if kind == WHOLE else level


@compiled
def of_window(rules: Tables, s: Any, slot: int, trace: int, t: int, value: float) -> float:
    """Return the mean or maximum of the last `n` tokens, this one included.

    Only values that count are kept: no 0 of a mean, no share at rest of a maximum. They are added
    up oldest first, whatever they came in: so the sum rounds the same.
    """
    rule = rules.traces[trace]
    mine = s.aggregates[slot, rule["aggregate"]]
    kind, n, first, rest = rule["kind"], rule["n"], rule["first_kept"], rule["rest"]
    if value != (0.0 if kind == MEAN else rest):
        kept = s.kept[slot, first + mine["kept"] % n]
        kept["at"] = t
        kept["value"] = value
        mine["kept"] += 1
        mine["restless"] = t + n - 1
    inside, at = 0, mine["kept"] % n
    for _ in range(min(n, mine["kept"])):
        at = at - 1 if at > 0 else n - 1
        if s.kept[slot, first + at]["at"] <= t - n:
            break
        inside += 1
    total, most = 0.0, -np.inf
    at = (mine["kept"] - inside) % n
    for _ in range(inside):
        kept = s.kept[slot, first + at]
        at = at + 1 if at + 1 < n else 0
        total += kept["value"]
        most = max(most, kept["value"])
    if kind == MEAN:
        return total / n
    if looked_since(s, slot, rule["scope"], t - n) >= inside:  # some token was at rest
        most = max(most, rest)
    return most


@compiled
def looked_since(s: Any, slot: int, scope: int, t: int) -> int:
    """Return how many of a scope's evaluated tokens before this one lie after position `t`."""
    ring, looked = s.looked[slot, scope], s.scopes[slot, scope]["looked"]
    n, at = 0, s.scopes[slot, scope]["place"]
    while n < min(looked, len(ring)):
        at = at - 1 if at > 0 else len(ring) - 1
        if ring[at] <= t:
            break
        n += 1
    return n
