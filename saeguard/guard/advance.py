"""Advance rule state by what a pass brings: the semantics of `saeguard.guard.rules`, by position.

Requests that bring one row (decoding) are advanced together; a request that brings several
(prefill, accepted drafts, a cached prefix) is advanced on its own, all its tokens at once.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from saeguard.guard.state import State, Terms, make_terms
from saeguard.guard.verdict import THRESHOLD
from saeguard.guard.watchlist import WatchList

PROMPT, OUTPUT = 0, 1
EVALUATED, SPECIAL, CACHED, ERROR, UNTRACKED = range(5)


class Rules(NamedTuple):
    """The policies' columns, in the watch list's order."""

    prompt_scope: np.ndarray
    """[P] bool."""
    output_scope: np.ndarray
    keep: np.ndarray
    """[P] tokens that a match stays on."""
    windows: tuple[tuple[int, int, np.ndarray], ...]
    """(k, n, the policies with that window)."""
    longest: int
    terms: Terms


class Tokens(NamedTuple):
    """Rows of one pass: consecutive tokens of one request, or one token of each of several."""

    position: np.ndarray
    """[rows] int64."""
    shares: np.ndarray
    """[rows, features] float32."""
    evidence: np.ndarray
    """[rows, P] float64."""
    watched: np.ndarray
    """[rows] bool, False for tokens excluded by id."""
    finite: np.ndarray
    """[rows] bool, False where the activations could not be read."""


def compile_rules(watchlist: WatchList) -> Rules:
    """Return the policies as columns."""
    policies = watchlist.policies
    windows = sorted({(p.window.k, p.window.n) for p in policies})
    return Rules(
        prompt_scope=np.array([p.scope in ("prompt", "both") for p in policies], bool),
        output_scope=np.array([p.scope in ("output", "both") for p in policies], bool),
        keep=np.array([p.keep for p in policies], np.int64),
        windows=tuple(
            (
                k,
                n,
                np.array([i for i, p in enumerate(policies) if (p.window.k, p.window.n) == (k, n)]),
            )
            for k, n in windows
        ),
        longest=max((n for _, n in windows), default=1),
        terms=make_terms(watchlist),
    )


def looked(rules: Rules, is_prompt: np.ndarray, usable: np.ndarray) -> np.ndarray:
    """Return [rows, P]: in the policy's scope, and evaluated."""
    scope = np.where(is_prompt[:, None], rules.prompt_scope, rules.output_scope)
    seen: np.ndarray = scope & usable[:, None]
    return seen


def _what(tokens: Tokens) -> np.ndarray:
    what: np.ndarray = np.where(tokens.watched, np.where(tokens.finite, EVALUATED, ERROR), SPECIAL)
    return what


def advance_many(rules: Rules, s: State, at: np.ndarray, tokens: Tokens) -> np.ndarray | None:
    """Advance distinct slots `at` by one token each; return [rows, P] where a first match came."""
    position = tokens.position
    is_prompt = position < s.prompt[at]
    seen = looked(rules, is_prompt, tokens.watched & tokens.finite)
    e = np.where(seen, tokens.evidence, -np.inf)
    score = _window_scores(rules, s, at, position, e)
    s.next[at] = position + 1
    s.counts[at, np.where(is_prompt, PROMPT, OUTPUT), _what(tokens)] += 1
    s.score[at] = np.maximum(s.score[at], score)

    t = rules.terms
    trace = np.where(seen[:, t.policy], tokens.shares[:, t.feature], -np.inf)
    above = trace > t.above
    if above.any():
        s.fired[at] += above
    peak = s.peak[at]
    higher = trace > peak
    if higher.any():  # seldom, once a request has some tokens
        s.peak[at] = np.where(higher, trace, peak)
        s.peak_at[at] = np.where(higher, position[:, None], s.peak_at[at])

    match = score > THRESHOLD
    on_until = s.on_until[at]
    if not match.any() and not (on_until >= position[:, None]).any():
        return None
    on_until = np.where(match, position[:, None] + rules.keep, on_until)
    s.on_until[at] = on_until
    s.matched[at] += on_until >= position[:, None]
    first = match & (s.first[at] < 0)
    s.first[at] = np.where(first, position[:, None], s.first[at])
    return first if first.any() else None


def _window_scores(
    rules: Rules, s: State, at: np.ndarray, position: np.ndarray, e: np.ndarray
) -> np.ndarray:
    if rules.longest == 1:
        return e
    s.ring[at, position % rules.longest] = e
    back = (position[:, None] - np.arange(rules.longest)) % rules.longest
    window = s.ring[at[:, None], back]
    score = np.empty_like(e)
    for k, n, policies in rules.windows:
        kth = np.partition(window[:, :n][:, :, policies], n - k, axis=1)[:, n - k]
        score[:, policies] = kth
    return score


def advance_one(rules: Rules, s: State, slot: int, tokens: Tokens) -> list[int]:
    """Advance one slot by consecutive tokens; return the policies that first matched."""
    position = tokens.position
    is_prompt = position < s.prompt[slot]
    seen = looked(rules, is_prompt, tokens.watched & tokens.finite)
    e = np.where(seen, tokens.evidence, -np.inf)
    np.add.at(s.counts[slot], (np.where(is_prompt, PROMPT, OUTPUT), _what(tokens)), 1)

    history = rules.longest - 1
    if history:
        back = np.arange(position[0] - history, position[0]) % rules.longest
        padded = np.concatenate([s.ring[slot, back], e])
        s.ring[slot, position[-rules.longest :] % rules.longest] = e[-rules.longest :]
    else:
        padded = e
    score = np.empty_like(e)
    for k, n, policies in rules.windows:
        windows = np.lib.stride_tricks.sliding_window_view(
            padded[history - n + 1 :, policies], n, axis=0
        )
        score[:, policies] = np.partition(windows, n - k, axis=-1)[..., n - k]
    s.score[slot] = np.maximum(s.score[slot], score.max(axis=0))
    s.next[slot] = position[-1] + 1

    t = rules.terms
    trace = np.where(seen[:, t.policy], tokens.shares[:, t.feature], -np.inf)
    s.fired[slot] += (trace > t.above).sum(axis=0)
    top = trace.argmax(axis=0)
    peak = trace[top, np.arange(len(top))]
    higher = peak > s.peak[slot]
    s.peak[slot] = np.where(higher, peak, s.peak[slot])
    s.peak_at[slot] = np.where(higher, position[top], s.peak_at[slot])

    match = score > THRESHOLD
    last = np.where(match, position[:, None] + rules.keep, -1)
    last = np.maximum.accumulate(np.concatenate([s.on_until[slot][None], last]))[1:]
    s.on_until[slot] = last[-1]
    s.matched[slot] += (last >= position[:, None]).sum(axis=0)
    first = np.flatnonzero(match.any(axis=0) & (s.first[slot] < 0))
    s.first[slot, first] = position[match[:, first].argmax(axis=0)]
    return [int(p) for p in first]


def skip(rules: Rules, s: State, slot: int, position: int, why: int) -> None:
    """Account for the tokens before `position` of which no activations came."""
    gap = position - int(s.next[slot])
    if gap <= 0:
        return
    prompt = int(np.clip(s.prompt[slot] - s.next[slot], 0, gap))
    s.counts[slot, PROMPT, why] += prompt
    s.counts[slot, OUTPUT, why] += gap - prompt
    if rules.longest > 1:
        missed = np.arange(max(int(s.next[slot]), position - rules.longest), position)
        s.ring[slot, missed % rules.longest] = -np.inf
    s.next[slot] = position
