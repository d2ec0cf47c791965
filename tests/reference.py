"""The rule semantics once more, slow and plain, for tests to compare the fast ones with.

No numpy, no shortcuts, and nothing shared with `saeguard.guard`: each line is a line of
docs/policy-language.md. Positions that a policy looks at are given: those in its scope that were
evaluated.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from saeguard.policy.types import And, Expr, KOf, Name, Not, Or, Points, Policy, Selection

Shares = Mapping[str, Sequence[float]]


@dataclass(frozen=True)
class Judged:
    """What the policy concludes of a text."""

    match: tuple[int, ...]
    """Positions at which enough tokens hold."""
    on: tuple[int, ...]
    """Those positions, and `keep` more after each."""
    score: float | None
    """Largest score; None where no window has enough tokens that were looked at."""

    @property
    def first_token(self) -> int | None:
        """Position of the first match."""
        return self.match[0] if self.match else None

    @property
    def matched_tokens(self) -> int:
        """How many tokens the policy is on at."""
        return len(self.on)


def judge(policy: Policy, shares: Shares, prompt_tokens: int, roles: Sequence[str] = ()) -> Judged:
    """Judge one text whose tokens were all evaluated, one share per token and feature."""
    tokens = range(len(next(iter(shares.values()))))
    looked = [t for t in tokens if in_scope(policy, t, prompt_tokens, roles)]
    return judge_where(policy, shares, looked, tokens)


def judge_where(
    policy: Policy, shares: Shares, looked: Sequence[int], seen: Sequence[int]
) -> Judged:
    """Judge one text of which `looked` was looked at, and `seen` reached the rules at all."""
    if policy.window.last:
        last = looked[-1:]
        match = tuple(u for u in last if holds_at(policy, shares, looked, u))
        score = [strength_at(policy, shares, looked, u) for u in last]
        return Judged(match, match, max(score, default=None))
    k, n = policy.window.k, policy.window.n
    match, scores = [], []
    strengths = {u: strength_at(policy, shares, looked, u) for u in looked}
    held = {u for u in looked if holds_at(policy, shares, looked, u)}
    for t in seen:
        window = [u for u in looked if u <= t and (n is None or u > t - n)]
        if len([u for u in window if u in held]) >= k:
            match.append(t)
        if len(window) >= k:
            scores.append(sorted((strengths[u] for u in window), reverse=True)[k - 1])
    on = [t for t in seen if any(t - policy.keep <= u <= t for u in match)]
    return Judged(tuple(match), tuple(on), max(scores, default=None))


def edited(policy: Policy, shares: Shares, looked: Sequence[int], tokens: int) -> list[int]:
    """Return the positions of a text at which an enforced clamp edits."""
    assert policy.clamp is not None
    judged = judge_where(policy, shares, looked, range(tokens))
    match policy.clamp.when:
        case "always":
            return list(looked)
        case "matched":
            return list(judged.on)
        case "rest":
            return [t for t in range(tokens) if any(u <= t for u in judged.match)]


def in_scope(policy: Policy, t: int, prompt_tokens: int, roles: Sequence[str] = ()) -> bool:
    """Return whether the policy looks at position `t`; `roles` has a word for each prompt token."""
    in_prompt = t < prompt_tokens
    match policy.scope:
        case "both":
            return True
        case "prompt":
            return in_prompt
        case "output":
            return not in_prompt or (len(roles) > 0 and roles[t] == "continued")
        case "assistant":
            return not in_prompt or roles[t] in {"assistant", "continued"}
        case role:
            return in_prompt and roles[t] == role


def compared(selection: Selection, shares: Shares, looked: Collection[int], t: int) -> float:
    """Return what a selection compares at `t`."""
    trace, n = shares[selection.feature], selection.over.n
    match selection.over.kind:
        case "token":
            return trace[t]
        case "mean":
            return sum(trace[u] for u in looked if t - n < u <= t) / n
        case "max":
            return max(trace[u] for u in looked if t - n < u <= t)
        case "whole":
            before = [trace[u] for u in looked if u <= t]
            return sum(before) / len(before)
        case "peak":
            return max(trace[u] for u in looked if u <= t)
        case "average":
            left = 0.5 ** (1 / n)
            average = 0.0
            for u in range(t + 1):
                average = left * average + (1 - left) * (trace[u] if u in looked else 0.0)
            return average


def holds_at(policy: Policy, shares: Shares, looked: Collection[int], t: int) -> bool:
    """Return whether the condition holds at `t`, with strict thresholds."""
    selections = {
        name: compared(s, shares, looked, t) > s.above for name, s in policy.detect.items()
    }
    return holds(policy.condition, selections)


def strength_at(policy: Policy, shares: Shares, looked: Collection[int], t: int) -> float:
    """Return how strongly the condition holds at `t`; 1 is the threshold."""
    strengths = {
        name: compared(s, shares, looked, t) / s.above for name, s in policy.detect.items()
    }
    return strength(policy.condition, strengths)


def holds(condition: Expr, selections: Mapping[str, bool]) -> bool:
    """Return whether a condition holds, in two-valued logic."""
    match condition:
        case Name(name):
            return selections[name]
        case Not(term):
            return not holds(term, selections)
        case And(terms):
            return all(holds(term, selections) for term in terms)
        case Or(terms):
            return any(holds(term, selections) for term in terms)
        case KOf(k, terms):
            return [holds(term, selections) for term in terms].count(True) >= k
        case Points(k, given):
            return sum(points for points, term in given if holds(term, selections)) >= k


def strength(condition: Expr, strengths: Mapping[str, float]) -> float:
    """Return how strongly a condition holds, in min-max logic around 1."""
    match condition:
        case Name(name):
            return strengths[name]
        case Not(term):
            return 2 - strength(term, strengths)
        case And(terms):
            return min(strength(term, strengths) for term in terms)
        case Or(terms):
            return max(strength(term, strengths) for term in terms)
        case KOf(k, terms):
            return sorted((strength(term, strengths) for term in terms), reverse=True)[k - 1]
        case Points(k, given):
            points = [strength(term, strengths) for many, term in given for _ in range(many)]
            return sorted(points, reverse=True)[k - 1]
