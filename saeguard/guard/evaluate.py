"""Evaluate the rules on blocks of tokens; `saeguard.guard.judge` defines the semantics.

A block holds consecutive tokens of each of several requests: the next token of each decoding
request, their tokens of several forward passes, or a chunk of one request's prompt.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from saeguard.guard.aggregates import aggregate, pass_over
from saeguard.guard.compiled_rules import Counted, Rules, Windowed
from saeguard.guard.condition_program import evidence
from saeguard.guard.scopes import OUTPUT, ROLES, TEMPLATE, in_scopes
from saeguard.guard.state import FATES, State
from saeguard.guard.verdict import THRESHOLD

EVALUATED, SPECIAL, CACHED, ERROR, UNTRACKED, MASSIVE = range(FATES)
"""What became of a token: evaluated, or skipped by reason."""


class Tokens(NamedTuple):
    """A block of tokens."""

    position: np.ndarray
    """[requests, tokens] int64, consecutive within each request."""
    shares: np.ndarray
    """[requests, tokens, features] float32 or float64."""
    eligible: np.ndarray
    """[requests, tokens] bool, False for tokens that are excluded by id."""
    finite: np.ndarray
    """[requests, tokens] bool, False if the token's activations could not be read."""
    massive: np.ndarray
    """[requests, tokens] bool, True for attention sinks: see `WatchList.massive`."""

    def take(self, rows: np.ndarray | None) -> Tokens:
        """Return the tokens at `rows` [requests, tokens] of a block whose arrays are [rows, ...].

        With None, the whole block becomes one request.
        """
        return Tokens(*(part[rows] for part in self))


class Scored(NamedTuple):
    """Role, values, evidence and score of each token of a block."""

    role: np.ndarray
    """[requests, tokens] indices into `ROLES`."""
    values: np.ndarray
    """[requests, tokens, features + aggregates] the values that selections compare."""
    looked: np.ndarray
    """[requests, tokens, scopes] bool: the token is in the scope and evaluated."""
    evidence: np.ndarray
    """[requests, tokens, P]; -inf if the token is out of scope, not evaluated or not sampled."""
    score: np.ndarray
    """[requests, tokens, P]. It may be -inf instead of a score that is no match and not above the
    request's highest score, which saves computing it."""


def roles_at(s: State, at: np.ndarray, position: np.ndarray) -> np.ndarray:
    """Return the roles of consecutive positions: [requests, tokens] indices into `ROLES`."""
    role = np.where(position < s.prompt[at, None], TEMPLATE, OUTPUT)
    for r in np.flatnonzero(
        position[:, 0] < s.prompt[at]
    ):  # few requests: most are past their prompt
        roles = s.roles[at[r]]
        if roles is not None:
            here = roles[position[r, 0] : position[r, -1] + 1]
            role[r, : len(here)] = here
    return role


def score_tokens(rules: Rules, s: State, at: np.ndarray, tokens: Tokens) -> Scored:
    """Return the scores of a block of requests in distinct slots `at`; advance their windows."""
    role = roles_at(s, at, tokens.position)
    looked = in_scopes(role, tokens.eligible & tokens.finite & ~tokens.massive)
    values = tokens.shares
    if len(rules.aggregates.feature):
        more = aggregate(rules.aggregates, s, at, tokens.position, values, looked)
        values = np.concatenate([values, more], axis=2)
    requests, length, width = values.shape
    ratio = values.reshape(-1, width).T[rules.trace].astype(np.float64) / rules.above
    e = evidence(rules.program, ratio).T.reshape(requests, length, -1)
    seen = looked[..., rules.scope]
    if rules.sampled:
        seen &= s.sampled[at, None]
    e = np.where(seen, e, -np.inf)
    score = e
    if len(rules.windowed.policy) or len(rules.counted.policy):
        score = e.copy()
        if len(rules.windowed.policy):
            _of_window(rules.windowed, s, at, tokens.position, score)
        if len(rules.counted.policy):
            _of_request(rules.counted, s, at, score)
    return Scored(role, values, looked, e, score)


def _of_window(w: Windowed, s: State, at: np.ndarray, position: np.ndarray, e: np.ndarray) -> None:
    """Replace the evidence at each token by the k-th largest of its window, in place.

    A window's k-th largest value can exceed the previous window's only if the new token's evidence
    does. So if no evidence in the block exceeds the request's highest score, and that score is no
    match, the block's windows are not evaluated. That is so for nearly all blocks.
    """
    x = e[..., w.policy]
    before = s.score[at[:, None], w.policy]
    worth = (x.max(axis=1) > before) | (before > THRESHOLD)
    score = np.full_like(x, -np.inf)
    for k, n, which in w.groups:
        r, j = np.nonzero(worth[:, which])
        if len(r):
            c = which[j]
            back = (position[r, :1] + np.arange(1 - n, 0)) % w.longest
            line = np.concatenate([s.ring[at[r, None], back, c[:, None]], x[r, :, c]], axis=1)
            windows = np.lib.stride_tricks.sliding_window_view(line, n, axis=1)
            score[r, :, c] = np.partition(windows, n - k, axis=-1)[..., n - k]
    kept = slice(-w.longest, None)
    s.ring[at[:, None], position[:, kept] % w.longest] = x[:, kept]
    e[..., w.policy] = score


def _of_request(counted: Counted, s: State, at: np.ndarray, e: np.ndarray) -> None:
    """Replace the evidence at each token by the k-th largest of the request so far, in place.

    This score never falls, so its highest value is that of the last token. For the other tokens it
    only matters whether the score exceeds the threshold, which a count of tokens above it decides.
    """
    x = e[..., counted.policy]
    best = s.best[at]
    held = (best > THRESHOLD).sum(axis=1)[:, None] + (x > THRESHOLD).cumsum(axis=1)
    most = best.shape[1]
    best = np.sort(np.concatenate([best, x], axis=1), axis=1)[:, -most:]
    s.best[at] = best
    kth = best[:, most - counted.k, np.arange(len(counted.k))][:, None]
    reached = held >= counted.k
    reached[:, -1] = True
    e[..., counted.policy] = np.where(reached, kth, -np.inf)


def advance(rules: Rules, s: State, at: np.ndarray, tokens: Tokens) -> np.ndarray | None:
    """Advance the requests in distinct slots `at` by a block.

    Returns:
        [requests, P] position of a policy's first match if it lies in this block, else -1; None if
        no policy has one.
    """
    position = tokens.position
    scored = score_tokens(rules, s, at, tokens)
    read = np.where(tokens.massive, MASSIVE, EVALUATED)
    what = np.where(tokens.eligible, np.where(tokens.finite, read, ERROR), SPECIAL)
    what += FATES * scored.role
    kinds = FATES * len(ROLES)
    what += kinds * np.arange(len(at))[:, None]
    counted = np.bincount(what.ravel(), minlength=kinds * len(at))
    s.counts[at] += counted.reshape(-1, len(ROLES), FATES)
    s.next[at] = position[:, -1] + 1
    _keep_scores(rules, s, at, position, scored)
    _record_activity(rules, s, at, position, scored)

    match = scored.score > THRESHOLD
    match[..., rules.last.policy] = False  # decided when the request ends
    # Few pairs of request and policy match in this block or are still on.
    r, p = np.nonzero(match.any(axis=1) | (s.on_until[at] >= position[:, :1]))
    if not len(r):
        return None
    slot, match, when = at[r], match[r, :, p], position[r]
    last = np.where(match, when + rules.keep[p, None], -1)
    last[:, 0] = np.maximum(last[:, 0], s.on_until[slot, p])
    last = np.maximum.accumulate(last, axis=1)
    s.on_until[slot, p] = last[:, -1]
    s.matched[slot, p] += (last >= when).sum(axis=1)
    new = np.flatnonzero(match.any(axis=1) & (s.first[slot, p] < 0))
    if not len(new):
        return None
    s.first[slot[new], p[new]] = when[new, match[new].argmax(axis=1)]
    first = np.full((len(at), len(rules.policies)), -1)
    first[r[new], p[new]] = s.first[slot[new], p[new]]
    return first


def _keep_scores(
    rules: Rules, s: State, at: np.ndarray, position: np.ndarray, scored: Scored
) -> None:
    """Keep each policy's highest score; with `for: the last token`, the score of that token."""
    best = np.maximum(s.score[at], scored.score.max(axis=1))
    which = rules.last.policy
    if len(which):
        seen = scored.evidence[..., which] > -np.inf
        end = seen.shape[1] - 1 - seen[:, ::-1].argmax(axis=1)
        r, j = np.nonzero(seen.any(axis=1))
        best[:, which] = s.score[at[:, None], which]
        best[r, which[j]] = scored.evidence[r, end[r, j], which[j]]
        s.last[at[r], j] = position[r, end[r, j]]
    s.score[at] = best


def _record_activity(
    rules: Rules, s: State, at: np.ndarray, position: np.ndarray, scored: Scored
) -> None:
    """Record how often and how strongly each selection fired."""
    t = rules.terms
    trace = np.where(scored.looked[..., t.scope], scored.values[..., t.trace], -np.inf)
    above = trace > t.above
    r, q = np.nonzero(above.any(axis=1))
    if len(r):
        s.fired[at[r], q] += above[r, :, q].sum(axis=1)
    top = trace.max(axis=1)
    r, q = np.nonzero(top > s.peak[at])  # few, once a request has some tokens
    if len(r):
        s.peak[at[r], q] = top[r, q]
        s.peak_at[at[r], q] = position[r, trace[r, :, q].argmax(axis=1)]


def skip(rules: Rules, s: State, slot: int, position: int, why: int) -> None:
    """Skip the tokens before `position` for the reason `why`; no activations of them were read."""
    first = int(s.next[slot])
    gap = position - first
    if gap <= 0:
        return
    role = roles_at(s, np.array([slot]), np.arange(first, position)[None])
    s.counts[slot, :, why] += np.bincount(role[0], minlength=len(ROLES))
    longest = rules.windowed.longest
    s.ring[slot, np.arange(max(first, position - longest), position) % longest] = -np.inf
    pass_over(rules.aggregates, s, slot, first, position)
    s.next[slot] = position
