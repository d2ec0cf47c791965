"""What a verdict must say of a text of which some tokens were not evaluated, slow and plain."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from saeguard.policy.types import Policy
from tests import reference

EVALUATED = "evaluated"
NEVER_SEEN = ("prefix_cached", "untracked", "not_forwarded", "aborted")


@dataclass(frozen=True)
class Said:
    """The parts of a verdict that follow from the text."""

    outcome: str
    score: float | None
    first_token: int | None
    matched_tokens: int
    features: Mapping[str, tuple[int, float, int]]
    tokens: int
    evaluated: int
    skipped: Mapping[str, int]


def judge(
    policy: Policy,
    shares: Mapping[str, Sequence[float]],
    status: Sequence[str],
    prompt_tokens: int,
    roles: Sequence[str] = (),
) -> Said:
    """Judge a text; `status` says of each token that it was evaluated, or why not."""
    tokens = range(len(status))
    scope = [t for t in tokens if reference.in_scope(policy, t, prompt_tokens, roles)]
    looked = [t for t in scope if status[t] == EVALUATED]
    seen = [t for t in tokens if status[t] not in NEVER_SEEN]
    judged = reference.judge_where(policy, shares, looked, seen)
    skipped = Counter(status[t] for t in scope if status[t] != EVALUATED)
    features: dict[str, tuple[int, float, int]] = {}
    for s in policy.detect.values():
        values = {u: reference.compared(s, shares, looked, u) for u in looked}
        if values:
            at = max(looked, key=lambda t: (values[t], -t))
            count = sum(value > s.above for value in values.values())
            if s.feature not in features or features[s.feature][0] < count:
                features[s.feature] = (count, values[at], at)
    if judged.match:
        outcome = "match"
    elif skipped["error"]:
        outcome = "error"
    else:
        outcome = "no_match" if looked else "not_evaluated"
    return Said(
        outcome,
        judged.score,
        judged.first_token,
        judged.matched_tokens,
        features,
        len(scope),
        len(looked),
        {reason: n for reason, n in skipped.items() if n},
    )


def same_score(one: float | None, other: float | None) -> bool:
    """Return whether two scores agree; a negation at its threshold is 1 and a hair above."""
    if one is None or other is None:
        return one is other
    return math.isclose(one, other, rel_tol=1e-12, abs_tol=1e-12)
