"""From a request's state to its verdicts and their coverage."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from saeguard.guard.advance import CACHED, ERROR, EVALUATED, SPECIAL, UNTRACKED, places
from saeguard.guard.places import MEMBERS, PLACES
from saeguard.guard.state import State
from saeguard.guard.tables import Rules
from saeguard.guard.verdict import Coverage, Fired, Outcome, Reason, Verdict

_REASONS: dict[int, Reason] = {
    SPECIAL: "special_token",
    CACHED: "prefix_cached",
    ERROR: "error",
    UNTRACKED: "untracked",
}


_MEMBERS = [np.flatnonzero(looks).tolist() for looks in MEMBERS.T]
"""By scope: its places."""


def coverages(s: State, slot: int, tokens: int) -> list[Coverage]:
    """Return the coverage of each place of a request of `tokens` tokens, in `PLACES`' order."""
    after = min(int(s.next[slot]), tokens)
    whole, left = (_count(s, slot, first, tokens) for first in (0, after))
    # The last token is never fed back; what else is missing was cut off.
    last = _count(s, slot, max(after, tokens - 1), tokens)
    found = []
    for place, counts in enumerate(s.counts[slot].tolist()):
        skipped: dict[Reason, int] = {
            reason: counts[what] for what, reason in _REASONS.items() if counts[what]
        }
        if last[place]:
            skipped["not_forwarded"] = last[place]
        if left[place] - last[place]:
            skipped["aborted"] = left[place] - last[place]
        found.append(Coverage(whole[place], counts[EVALUATED], skipped))
    return found


def _count(s: State, slot: int, first: int, end: int) -> list[int]:
    """Return how many of the tokens `first`, ... before `end` stand in each place."""
    if first >= end:
        return [0] * len(PLACES)
    place = places(s, np.array([slot]), np.arange(first, end)[None])
    counts: list[int] = np.bincount(place[0], minlength=len(PLACES)).tolist()
    return counts


def add(parts: Sequence[Coverage]) -> Coverage:
    """Return the sum of several coverages."""
    skipped: dict[Reason, int] = {}
    for part in parts:
        for reason, n in part.skipped.items():
            skipped[reason] = skipped.get(reason, 0) + n
    return Coverage(sum(p.tokens for p in parts), sum(p.evaluated for p in parts), skipped)


def verdicts_of(rules: Rules, s: State, slot: int, tokens: int) -> list[Verdict]:
    """Return what each policy concludes of the request in `slot`.

    Args:
        rules: the compiled policies.
        s: the state.
        slot: the request's.
        tokens: prompt and output tokens; those never forwarded count as not evaluated.
    """
    of_place = coverages(s, slot, tokens)
    covered = [add([of_place[i] for i in members]) for members in _MEMBERS]
    scores, firsts = s.score[slot].tolist(), s.first[slot].tolist()
    on, enforced = s.matched[slot].tolist(), s.enforced[slot].tolist()
    acted, sampled = s.acted[slot].tolist(), s.sampled[slot].tolist()
    fired = list(zip(*(a[slot].tolist() for a in (s.fired, s.peak, s.peak_at)), strict=True))
    verdicts = []
    for i, policy in enumerate(rules.policies):
        coverage = covered[rules.scope[i]]
        if not sampled[i]:
            coverage = Coverage(coverage.tokens, 0, _all(coverage.tokens))
        matched = firsts[i] >= 0
        error = coverage.skipped.get("error", 0) > 0
        acts = matched and enforced[i] and (acted[i] or policy.action != "clamp")
        verdicts.append(
            Verdict(
                policy=policy.id,
                digest=policy.digest,
                mode="enforce" if enforced[i] else "shadow",
                action=policy.action,
                severity=policy.severity,
                outcome=outcome(matched=matched, error=error, evaluated=coverage.evaluated),
                score=scores[i] if np.isfinite(scores[i]) else None,
                first_token=firsts[i] if matched else None,
                matched_tokens=on[i],
                acted=policy.action if acts else None,
                features=_fired(rules.terms.of_policy[i], fired) if sampled[i] else {},
                coverage=coverage,
                error="not_read" if error else None,
                message=policy.message if acts and policy.action == "stop" else None,
            )
        )
    return verdicts


def _all(tokens: int) -> dict[Reason, int]:
    return {"not_sampled": tokens} if tokens else {}


def outcome(*, matched: bool, error: bool, evaluated: int) -> Outcome:
    """Fold nothing into `no_match`: a match stands, else an error, else whether it looked."""
    if matched:
        return "match"
    if error:
        return "error"
    return "no_match" if evaluated else "not_evaluated"


def _fired(
    terms: Sequence[tuple[str, int]], all_fired: Sequence[tuple[int, float, int]]
) -> dict[str, Fired]:
    """Return each feature's activity; of several selections of it, that of the one held most."""
    fired: dict[str, Fired] = {}
    for name, q in terms:
        count, peak, at = all_fired[q]
        if at >= 0 and (name not in fired or fired[name].count < count):
            fired[name] = Fired(count, peak, at)
    return fired
