"""From a request's state to its verdicts and their coverage."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from saeguard.guard.advance import (
    CACHED,
    ERROR,
    EVALUATED,
    PROMPT,
    SPECIAL,
    UNTRACKED,
    Rules,
)
from saeguard.guard.rules import outcome
from saeguard.guard.state import State
from saeguard.guard.verdict import Coverage, Fired, Reason, Verdict
from saeguard.policy.types import Policy

_REASONS: dict[int, Reason] = {
    SPECIAL: "special_token",
    CACHED: "prefix_cached",
    ERROR: "error",
    UNTRACKED: "untracked",
}


def coverage_of(s: State, slot: int, scope: int, tokens: int) -> Coverage:
    """Return the coverage of the prompt or of the output of a request of `tokens` tokens."""
    prompt = int(min(s.prompt[slot], tokens))
    lo, hi = (0, prompt) if scope == PROMPT else (prompt, tokens)
    skipped: dict[Reason, int] = {
        reason: int(s.counts[slot, scope, what])
        for what, reason in _REASONS.items()
        if s.counts[slot, scope, what]
    }
    # The last token is never fed back; what else is missing was cut off.
    left = hi - max(lo, min(int(s.next[slot]), hi))
    last = 1 if left and hi == tokens else 0
    if last:
        skipped["not_forwarded"] = 1
    if left - last:
        skipped["aborted"] = left - last
    return Coverage(hi - lo, int(s.counts[slot, scope, EVALUATED]), skipped)


def add(parts: Sequence[Coverage]) -> Coverage:
    """Return the sum of several coverages."""
    skipped: dict[Reason, int] = {}
    for part in parts:
        for reason, n in part.skipped.items():
            skipped[reason] = skipped.get(reason, 0) + n
    return Coverage(sum(p.tokens for p in parts), sum(p.evaluated for p in parts), skipped)


def verdict_of(
    rules: Rules, s: State, slot: int, i: int, policy: Policy, covered: Sequence[Coverage]
) -> Verdict:
    """Return what policy `i` concludes of the request in `slot`.

    Args:
        rules: the compiled policies.
        s: the state.
        slot: the request's.
        i: the policy's column.
        policy: the policy.
        covered: coverage of prompt and output.
    """
    looks = (rules.prompt_scope[i], rules.output_scope[i])
    coverage = add([c for c, look in zip(covered, looks, strict=True) if look])
    matched = bool(s.first[slot, i] >= 0)
    error = coverage.skipped.get("error", 0) > 0
    enforced = bool(s.enforced[slot, i])
    acts = matched and enforced
    if policy.action == "clamp":
        acts = acts and bool(s.acted[slot, i])
    score = float(s.score[slot, i])
    return Verdict(
        policy=policy.id,
        digest=policy.digest,
        mode="enforce" if enforced else "shadow",
        action=policy.action,
        severity=policy.severity,
        outcome=outcome(matched=matched, error=error, evaluated=coverage.evaluated),
        score=score if np.isfinite(score) else None,
        first_token=int(s.first[slot, i]) if matched else None,
        matched_tokens=int(s.matched[slot, i]),
        acted=policy.action if acts else None,
        features=_fired(rules, s, slot, i),
        coverage=coverage,
        error="not_read" if error else None,
    )


def _fired(rules: Rules, s: State, slot: int, i: int) -> dict[str, Fired]:
    fired: dict[str, Fired] = {}
    for q in np.flatnonzero(rules.terms.policy == i):
        name, count = rules.terms.name[q], int(s.fired[slot, q])
        if s.peak_at[slot, q] < 0 or (name in fired and fired[name].count >= count):
            continue
        fired[name] = Fired(count, float(s.peak[slot, q]), int(s.peak_at[slot, q]))
    return fired
