"""Bound the score that another policy would have had, from a recorded event.

An event keeps little: its policy's score, and each feature's highest share with its position.
Two things follow for another policy that reads the same tokens.

- *From the peaks.* At no token was a feature above its peak, so the condition at its peaks bounds
  the score from above. At a peak's own position the feature's share is known exactly, which bounds
  it from below if one token is enough for a match.
- *From the score.* If only thresholds differ and the condition has no `not`, evidence of every
  selection moves by a known factor. Minimum, maximum and k-th largest keep order and scale with
  their inputs, so the score moves by no less than the least factor and no more than the largest.

Anything else needs the tokens themselves: a recording.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Protocol, TypeAlias

from saeguard.guard.verdict import THRESHOLD
from saeguard.policy.condition import terms_of
from saeguard.policy.types import And, Expr, KOf, Name, Not, Or, Points, Policy, Selection, Window

ROUNDING = 5e-7
"""Events give shares to six digits."""
RELATIVE = 1e-12
"""Of a product of float64 numbers, generously."""

UNJUDGED = (
    "id", "title", "owner", "severity", "mode", "action", "on_error", "uncached", "rationale",
    "falsepositives", "review_by", "keep", "clamp", "exceptions", "path", "digest", "message",
)  # fmt: skip
"""Fields that no verdict depends on. Any other field does, one of tomorrow too."""

Interval: TypeAlias = tuple[float, float]
EVERYTHING: Interval = (-math.inf, math.inf)


class Peak(Protocol):
    """One feature's activity within a request, as events record it."""

    @property
    def max(self) -> float:
        """Its highest share."""

    @property
    def at(self) -> int:
        """Position of that share."""


@dataclass(frozen=True, slots=True)
class Recorded:
    """What an event records of a request."""

    score: float | None
    peaks: Mapping[str, Peak]
    """By feature."""


def same_verdict(old: Policy, new: Policy) -> bool:
    """Return whether two policies reach the same verdict on every text."""
    names = {field.name for field in fields(Policy)}
    ignored = {name: getattr(new, name) for name in UNJUDGED if name in names}
    return replace(old, **ignored) == new


def foretell(event: Recorded, old: Policy, new: Policy) -> Interval:
    """Return bounds of the score of policy `new` on the request that `old` judged.

    They hold if the policies' feature sets are as they were when the event was written.

    Args:
        event: what the event of `old` records.
        old: the policy that wrote it.
        new: the policy whose score is bounded.
    """
    if event.score is not None and same_verdict(old, new):
        return event.score, event.score
    if old.feature_set != new.feature_set or old.scope != new.scope:
        return EVERYTHING
    # Of a feature compared as a mean or the like, the event records the highest mean, not share.
    summed = {s.feature for s in old.detect.values() if not _plain(s)}
    peaks = {name: peak for name, peak in event.peaks.items() if name not in summed}
    return _both(_from_peaks(peaks, new), _from_score(event, old, new))


def verdict_of(bounds: Interval) -> str:
    """Return `match`, `no_match`, or `unknown` if the event does not decide it."""
    low, high = bounds
    return "match" if low > THRESHOLD else "no_match" if high <= THRESHOLD else "unknown"


def _plain(selection: Selection) -> bool:
    """Return whether a selection compares each token's own share."""
    return selection == Selection(selection.feature, selection.above)


def _from_peaks(peaks: Mapping[str, Peak], new: Policy) -> Interval:
    ceilings = {
        name: _ceiling(peaks.get(selection.feature), selection)
        for name, selection in new.detect.items()
    }
    everywhere = {name: (-math.inf, high) for name, high in ceilings.items()}
    high = _evidence(new.condition, everywhere)[1]
    if not all(map(_plain, new.detect.values())) or new.window != Window():
        return -math.inf, high
    lows = [-math.inf]
    for at in {peak.at for peak in peaks.values()}:
        here = {
            name: _here(peaks.get(s.feature), s, at, ceilings[name])
            for name, s in new.detect.items()
        }
        lows.append(_evidence(new.condition, here)[0])
    return max(lows), high


def _ceiling(peak: Peak | None, selection: Selection) -> float:
    # A mean or a maximum over several tokens is no higher than the highest, or than nothing.
    return math.inf if peak is None else (max(peak.max, 0.0) + ROUNDING) / selection.above


def _here(peak: Peak | None, selection: Selection, at: int, ceiling: float) -> Interval:
    if peak is None or peak.at != at:
        return -math.inf, ceiling
    return (peak.max - ROUNDING) / selection.above, (peak.max + ROUNDING) / selection.above


def _from_score(event: Recorded, old: Policy, new: Policy) -> Interval:
    if event.score is None or any(isinstance(term, Not) for term in terms_of(new.condition)):
        return EVERYTHING
    if list(old.detect) != list(new.detect):
        return EVERYTHING
    raised = {
        name: replace(selection, above=new.detect[name].above)
        for name, selection in old.detect.items()
    }
    if not same_verdict(replace(old, detect=raised), new):
        return EVERYTHING
    factors = [old.detect[name].above / s.above for name, s in new.detect.items()]
    ends = sorted((min(factors) * event.score, max(factors) * event.score))
    slack = abs(event.score) * max(factors) * RELATIVE
    return ends[0] - slack, ends[1] + slack


def _both(a: Interval, b: Interval) -> Interval:
    return max(a[0], b[0]), min(a[1], b[1])


def _evidence(expr: Expr, at: Mapping[str, Interval]) -> Interval:
    """Return the evidence of a condition, given an interval for each selection's."""
    match expr:
        case Name(name):
            return at[name]
        case Not(term):
            low, high = _evidence(term, at)
            return 2.0 - high, 2.0 - low
        case And(terms):
            return _kth([(1, term) for term in terms], len(terms), at)
        case Or(terms):
            return _kth([(1, term) for term in terms], 1, at)
        case KOf(k, terms):
            return _kth([(1, term) for term in terms], k, at)
        case Points(k, terms):
            return _kth(terms, k, at)


def _kth(terms: Sequence[tuple[int, Expr]], k: int, at: Mapping[str, Interval]) -> Interval:
    """Return the highest evidence that terms of `k` points in all reach."""
    found = [(points, _evidence(term, at)) for points, term in terms]
    low, high = (_reached([(ends[end], points) for points, ends in found], k) for end in (0, 1))
    return low, high


def _reached(ends: Sequence[tuple[float, int]], k: int) -> float:
    gathered = 0
    for value, points in sorted(ends, reverse=True):
        gathered += points
        if gathered >= k:
            return value
    return -math.inf
