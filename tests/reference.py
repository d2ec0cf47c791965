"""The rule semantics once more, slow and plain, for tests to compare the fast ones with.

No numpy, no shortcuts, and nothing shared with `saeguard.guard`: each line is a line of
docs/policy-language.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from saeguard.policy.types import And, Expr, KOf, Name, Not, Or, Policy


@dataclass(frozen=True)
class Judged:
    """What the policy concludes of a text whose tokens were all evaluated."""

    match: tuple[int, ...]
    """Positions at which the window is full enough."""
    on: tuple[int, ...]
    """Those positions, and `keep` more after each."""
    score: float | None
    """Largest window score; None where no window has enough tokens in scope."""

    @property
    def first_token(self) -> int | None:
        """Position of the first match."""
        return self.match[0] if self.match else None

    @property
    def matched_tokens(self) -> int:
        """How many tokens the policy is on at."""
        return len(self.on)


def judge(policy: Policy, shares: Mapping[str, Sequence[float]], prompt_tokens: int) -> Judged:
    """Judge one text from its feature shares, one value per token and feature."""
    tokens = len(next(iter(shares.values())))
    looked_at = [t for t in range(tokens) if in_scope(policy, t, prompt_tokens)]
    k, n = policy.window.k, policy.window.n
    match, scores = [], []
    for t in range(tokens):
        window = [u for u in looked_at if t - n < u <= t]
        if sum(holds_at(policy, shares, u) for u in window) >= k:
            match.append(t)
        if len(window) >= k:
            strengths = sorted((strength_at(policy, shares, u) for u in window), reverse=True)
            scores.append(strengths[k - 1])
    on = [t for t in range(tokens) if any(t - policy.keep <= u <= t for u in match)]
    return Judged(tuple(match), tuple(on), max(scores, default=None))


def in_scope(policy: Policy, t: int, prompt_tokens: int) -> bool:
    """Return whether the policy looks at position `t`."""
    in_prompt = t < prompt_tokens
    return {"both": True, "prompt": in_prompt, "output": not in_prompt}[policy.scope]


def holds_at(policy: Policy, shares: Mapping[str, Sequence[float]], t: int) -> bool:
    """Return whether the condition holds at `t`, with strict thresholds."""
    selections = {name: shares[s.feature][t] > s.above for name, s in policy.detect.items()}
    return holds(policy.condition, selections)


def strength_at(policy: Policy, shares: Mapping[str, Sequence[float]], t: int) -> float:
    """Return how strongly the condition holds at `t`; 1 is the threshold."""
    strengths = {name: shares[s.feature][t] / s.above for name, s in policy.detect.items()}
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
