"""One token's step of one policy: `for`, `keep`, and until when later tokens concern it."""

from __future__ import annotations

from typing import Any

import numpy as np

from saeguard.guard.aggregates import looked_since
from saeguard.guard.compiled import compiled
from saeguard.guard.evidence import evidence
from saeguard.guard.tables import AWAKE, COUNT, FOREVER, LAST, THRESHOLD, WINDOW, Scratch, Tables


@compiled
def step_policy(rules: Tables, s: Any, x: Scratch, slot: int, p: int, t: int, looked: bool) -> bool:
    """Advance a policy by the token at `t`; return whether this is its first match.

    Args:
        rules: the compiled policies.
        s: the state.
        x: with the values of the traces.
        slot: of the request.
        p: the policy.
        t: the position.
        looked: whether the policy looks at the token, and it was evaluated.
    """
    rule, mine = rules.policies[p], s.policies[slot, p]
    kind = rule["kind"]
    # Windows that ended at a quiet token since the last step held the evidence at rest.
    if kind == WINDOW and mine["sampled"] and s.full[slot, rule["window"]] >= mine["idle_from"]:
        mine["score"] = max(mine["score"], rule["rest"])
    mine["idle_from"] = t + 1
    e = evidence(rules, x, p) if looked else -np.inf
    if looked:
        mine["last"] = t
        mine["kept"] += 1
    if kind == LAST:
        score = e
        if looked:
            mine["score"] = e
    else:
        score = score_at(rules, s, x, slot, p, t, looked, e)
        mine["score"] = max(mine["score"], score)
    if len(x.scores):
        x.evidence[p] = e
        x.scores[p] = score
    match = score > THRESHOLD and kind != LAST
    stay_on(rules, s, slot, p, t, match, e)
    first = match and mine["first"] < 0
    if first:
        mine["first"] = t
    return first


@compiled
def stay_on(rules: Tables, s: Any, slot: int, p: int, t: int, match: bool, e: float) -> None:
    """Count the token if the policy is on; list the policy if it concerns later tokens."""
    rule, mine = rules.policies[p], s.policies[slot, p]
    if match:
        mine["on_until"] = max(mine["on_until"], t + rule["keep"])
        if rule["kind"] == COUNT:
            mine["awake"] = FOREVER
    if mine["on_until"] >= t:
        mine["matched"] += 1
        mine["awake"] = max(mine["awake"], mine["on_until"])
    if e > -np.inf and (e != rule["rest"] or e > THRESHOLD):
        mine["awake"] = max(mine["awake"], t + rule["n"] - 1)
    if mine["awake"] > t and not mine["listed"]:
        here = s.requests[slot]
        mine["listed"] = 1
        s.lists[slot, AWAKE, here["awake"]] = p
        here["awake"] += 1


@compiled
def score_at(
    rules: Tables, s: Any, x: Scratch, slot: int, p: int, t: int, looked: bool, e: float
) -> float:
    """Return what `for` makes of a token's evidence."""
    rule, mine = rules.policies[p], s.policies[slot, p]
    if rule["kind"] == COUNT:
        first, k = rule["first_kept"], rule["k"]
        if looked:
            keep_highest(s.kept[slot], first, k, mine["kept"] - 1, e)
        return s.kept[slot, first + k - 1]["value"] if mine["kept"] >= k else -np.inf
    if rule["n"] == 1:
        return e
    return kth_of_window(rules, s, x, slot, p, t, looked, e)


@compiled
def keep_highest(kept: np.ndarray, first: int, most: int, n: int, value: float) -> None:
    """Insert a value into the `most` highest of `n` earlier ones, which are sorted downwards."""
    i = min(n, most)
    while i > 0 and kept[first + i - 1]["value"] < value:
        if i < most:
            kept[first + i]["value"] = kept[first + i - 1]["value"]
        i -= 1
    if i < most:
        kept[first + i]["value"] = value


@compiled
def kth_of_window(
    rules: Tables, s: Any, x: Scratch, slot: int, p: int, t: int, looked: bool, e: float
) -> float:
    """Keep a token's evidence; return the k-th largest of the policy's window.

    A window's k-th largest value can exceed the previous window's only if the new token's evidence
    does. So if the evidence does not exceed the request's highest score, and that score is no
    match, -inf is returned instead.
    """
    rule, mine = rules.policies[p], s.policies[slot, p]
    n, first = rule["n"], rule["first_kept"]
    if looked:
        kept = s.kept[slot, first + (mine["kept"] - 1) % n]
        kept["at"] = t
        kept["value"] = e
    if not (e > mine["score"] or mine["score"] > THRESHOLD):
        return -np.inf
    inside = 0
    at = mine["kept"] % n
    for _ in range(min(n, mine["kept"])):
        at = at - 1 if at > 0 else n - 1
        kept = s.kept[slot, first + at]
        if kept["at"] <= t - n:
            break
        x.window[inside] = kept["value"]
        inside += 1
    at_rest = looked_since(s, slot, rule["scope"], t - n) - inside
    if looked:
        at_rest += 1
    for _ in range(at_rest):
        x.window[inside] = rule["rest"]
        inside += 1
    return kth_largest(x.window, inside, rule["k"])


@compiled
def kth_largest(values: np.ndarray, n: int, k: int) -> float:
    """Return the k-th largest of the first `n` values, which are overwritten; -inf if n < k."""
    if n < k:
        return -np.inf
    highest = -np.inf
    for _ in range(k):
        best = 0
        for i in range(n):
            if values[i] > values[best]:
                best = i
        highest = values[best]
        values[best] = -np.inf
    return highest
