"""What the rules found of a request, with the quiet tokens that were only counted."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from saeguard.guard.compiled import compiled
from saeguard.guard.tables import COUNT, LAST, THRESHOLD, WINDOW, Tables


class Found(NamedTuple):
    """What the rules found of one request, quiet tokens included."""

    score: np.ndarray
    """[P] highest score; not finite if no token was evaluated."""
    first: np.ndarray
    """[P] position of the first match, -1 without one."""
    matched: np.ndarray
    """[P] number of tokens on which the policy was on."""
    fired: np.ndarray
    """[Q] tokens above the threshold of each term."""
    peak: np.ndarray
    """[Q] highest value of each term."""
    peak_at: np.ndarray
    """[Q] its first position, -1 if no token was evaluated."""


def conclude(rules: Tables, s: Any, slot: int) -> Found:
    """Return what the policies and terms found of a request.

    Args:
        rules: the compiled policies.
        s: the state.
        slot: of the request.
    """
    policies, terms = len(rules.policies), len(rules.terms)
    found = Found(
        score=np.empty(policies),
        first=np.empty(policies, np.int64),
        matched=np.empty(policies, np.int64),
        fired=np.empty(terms, np.int64),
        peak=np.empty(terms),
        peak_at=np.empty(terms, np.int64),
    )
    conclude_into(rules, s, slot, found)
    return found


@compiled
def conclude_into(rules: Tables, s: Any, slot: int, out: Found) -> None:
    """Write what the policies and terms found of a request to `out`."""
    for p in range(len(rules.policies)):
        mine = s.policies[slot, p]
        out.score[p], out.first[p], out.matched[p] = mine["score"], mine["first"], mine["matched"]
        if mine["sampled"]:
            conclude_policy(rules, s, slot, p, out)
    for q in range(len(rules.terms)):
        term, rule = s.terms[slot, q], rules.terms[q]
        rest, scope = rules.traces[rule["trace"]]["rest"], s.scopes[slot, rule["scope"]]
        out.fired[q], out.peak[q], out.peak_at[q] = term["fired"], term["peak"], term["peak_at"]
        if rest > rule["above"]:
            out.fired[q] += scope["looked"] - term["touched"]
        if term["touched"] == 0 and scope["looked"] > 0:
            out.peak[q], out.peak_at[q] = rest, scope["first"]


@compiled
def conclude_policy(rules: Tables, s: Any, slot: int, p: int, out: Found) -> None:
    """Let a policy's score cover the tokens at which it was at rest."""
    rule, mine = rules.policies[p], s.policies[slot, p]
    scope, rest = s.scopes[slot, rule["scope"]], rule["rest"]
    if rule["kind"] == WINDOW:
        if s.full[slot, rule["window"]] >= mine["idle_from"]:
            out.score[p] = max(out.score[p], rest)
    elif rule["kind"] == COUNT:
        score = kth_of_request(s.kept[slot], rule, mine["kept"], scope["looked"])
        out.score[p] = max(out.score[p], score)
    elif rule["kind"] == LAST:
        last = mine["last"]
        if scope["last"] > last:
            out.score[p], last = rest, scope["last"]
        match = last >= 0 and out.score[p] > THRESHOLD
        out.first[p] = last if match else -1
        out.matched[p] = match


@compiled
def kth_of_request(kept: np.ndarray, rule: Any, n: int, looked: int) -> float:
    """Return the k-th largest evidence of a request: of `n` tokens, and of the others at rest."""
    k, first, above = rule["k"], rule["first_kept"], 0
    if looked < k:
        return -np.inf
    while above < min(n, k) and kept[first + above]["value"] >= rule["rest"]:
        above += 1
    if above >= k:
        return kept[first + k - 1]["value"]
    if above + looked - n >= k:
        return rule["rest"]
    return kept[first + k - 1 - (looked - n)]["value"]
