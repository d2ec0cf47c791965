"""From a request's state to its verdicts and their coverage."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from saeguard.guard.advance import CACHED, ERROR, EVALUATED, OUTPUT, PROMPT, SPECIAL, UNTRACKED
from saeguard.guard.state import State
from saeguard.guard.tables import SCOPES, Rules
from saeguard.guard.verdict import Coverage, Fired, Outcome, Reason, Verdict

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


def verdicts_of(rules: Rules, s: State, slot: int, tokens: int) -> list[Verdict]:
    """Return what each policy concludes of the request in `slot`.

    Args:
        rules: the compiled policies.
        s: the state.
        slot: the request's.
        tokens: prompt and output tokens; those never forwarded count as not evaluated.
    """
    prompt, output = (coverage_of(s, slot, scope, tokens) for scope in (PROMPT, OUTPUT))
    of_scope = {"prompt": prompt, "output": output, "both": add([prompt, output])}
    covered = [of_scope[scope] for scope in SCOPES]
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
                approximate=rules.approximate[i],
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
