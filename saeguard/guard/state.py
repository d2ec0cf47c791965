"""The rules' state of all requests in flight: arrays of records with one entry per slot.

A record holds what belongs together, so a policy that is evaluated costs one line of the
processor's cache. Compiled loops read and write `state.policies[slot, p]["score"]`.
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypeVar

import numpy as np

from saeguard.guard.compiled_rules import Rules
from saeguard.guard.scopes import ROLES, SCOPES
from saeguard.guard.tables import FATES

REQUEST = np.dtype(
    [
        ("next", "i4"),  # the next position; every token before it was evaluated or skipped
        ("prompt", "i4"),  # prompt tokens
        ("restless", "i4"),  # number of entries of `lists[slot, RESTLESS]`; so on for the others
        ("awake", "i4"),
        ("unsettled", "i4"),
    ]
)

SCOPE = np.dtype(
    [
        ("looked", "i4"),  # tokens in the scope that were evaluated
        ("place", "i4"),  # where the next of them goes in the ring `looked`
        ("first", "i4"),  # position of the first of them, or -1
        ("last", "i4"),  # position of the last of them, or -1
    ]
)
POLICY = np.dtype(
    [
        ("score", "f8"),  # highest score so far
        ("first", "i4"),  # position of the first match, -1 before it
        ("matched", "i4"),  # tokens on which the policy was on
        ("on_until", "i4"),  # last position at which the matches so far keep the policy on, or -1
        ("awake", "i4"),  # last position at which the policy is evaluated whatever fires
        ("idle_from", "i4"),  # the position after the last one at which it was evaluated
        ("last", "i4"),  # position of the last token that it looked at and evaluated, or -1
        ("kept", "i4"),  # tokens that it looked at and evaluated; they are kept in `kept`
        ("listed", "u1"),  # whether it is in the list AWAKE
        ("sampled", "u1"),  # whether the policy looks at this request
        ("enforced", "u1"),
        ("acted", "u1"),  # whether a clamp edited a row
    ],
    align=True,
)
KEPT = np.dtype([("value", "f8"), ("at", "i4")])
"""A token's position, and its evidence or share."""
AGGREGATE = np.dtype(
    [
        ("level", "f8"),  # average, maximum or sum so far
        ("at", "i4"),  # position of the last token in the average
        ("kept", "i4"),  # tokens of the window that were kept so far
        ("restless", "i4"),  # last position at which it may differ from its value at rest
        ("listed", "u1"),  # whether it is in the list RESTLESS
    ],
    align=True,
)
TERM = np.dtype(
    [
        ("peak", "f8"),  # highest value
        ("peak_at", "i4"),  # its first position, or -1
        ("fired", "i4"),  # tokens above the threshold
        ("touched", "i4"),  # tokens at which the term was looked at
        ("settled", "u1"),  # whether `peak` covers a quiet token
        ("listed", "u1"),  # whether it is in the list UNSETTLED
    ],
    align=True,
)


class State(NamedTuple):
    """Arrays over the ledger's slots; `P` policies, `Q` terms, `A` aggregates of the rules."""

    requests: np.ndarray
    """[slots] REQUEST."""
    counts: np.ndarray
    """[slots, roles, FATES] tokens evaluated, then skipped by reason; see `tables.EVALUATED`."""
    scopes: np.ndarray
    """[slots, scopes] SCOPE."""
    full: np.ndarray
    """[slots, windows] last position at which a quiet window `k of n` held k tokens, or -1."""
    policies: np.ndarray
    """[slots, P] POLICY."""
    aggregates: np.ndarray
    """[slots, A] AGGREGATE."""
    terms: np.ndarray
    """[slots, Q] TERM."""
    looked: np.ndarray
    """[slots, scopes, longest] positions of the last evaluated tokens of a scope, a ring."""
    kept: np.ndarray
    """[slots, kept] KEPT: rings of policies and aggregates; `first_kept` and `n` say which part."""
    lists: np.ndarray
    """[slots, 3, most] int32: RESTLESS, AWAKE and UNSETTLED."""


COUNTED = 3
"""The last arrays of a state: counts elsewhere say how much of them is valid."""

Arrays = TypeVar("Arrays", bound=tuple[Any, ...])


def make_state(rules: Rules, slots: int) -> State:
    """Return the state of `slots` requests without evaluated tokens."""
    t = rules.tables
    policies, terms = len(t.policies), len(t.terms)
    most = max(policies, terms, rules.aggregates, 1)
    return State(
        requests=np.zeros(slots, REQUEST),
        counts=np.zeros((slots, len(ROLES), FATES), np.int64),
        scopes=_records((slots, len(SCOPES)), SCOPE, first=-1, last=-1),
        full=np.full((slots, len(t.windows)), -1, np.int64),
        policies=_records(
            (slots, policies),
            POLICY,
            score=-np.inf,
            first=-1,
            on_until=-1,
            awake=-1,
            last=-1,
            sampled=True,
        ),
        aggregates=_records((slots, rules.aggregates), AGGREGATE, restless=-1, at=-1),
        terms=_records((slots, terms), TERM, peak=-np.inf, peak_at=-1),
        looked=np.zeros((slots, len(SCOPES), rules.longest), np.int64),
        kept=np.zeros((slots, rules.kept), KEPT),
        lists=np.zeros((slots, 3, most), np.int32),
    )


def _records(shape: tuple[int, ...], dtype: np.dtype[Any], **values: float) -> np.ndarray:
    out = np.zeros(shape, dtype)
    for name, value in values.items():
        out[name] = value
    return out


def blank(like: Arrays, slots: int) -> Arrays:
    """Return uninitialised arrays for `slots` requests; a slot is written before it is read.

    Uninitialised memory costs nothing until it is written, however many slots there are.
    """
    return _like(like, (np.empty((slots, *a.shape[1:]), a.dtype) for a in like))


def start_slot(state: State, slot: int, empty: State) -> None:
    """Start a request in a slot; rings and lists stay, since their counts are 0."""
    for array, start in zip(state[:-COUNTED], empty, strict=False):
        array[slot] = start[0]


def write_slot(arrays: Arrays, slot: int, saved: Arrays) -> None:
    """Overwrite one slot with what `copy_slot` returned."""
    for array, old in zip(arrays, saved, strict=True):
        array[slot] = old[0]


def copy_slot(arrays: Arrays, slot: int) -> Arrays:
    """Return arrays of one slot, a copy of `slot`."""
    return _like(arrays, (a[slot : slot + 1].copy() for a in arrays))


def grown(arrays: Arrays, more: Arrays) -> Arrays:
    """Return arrays with the slots of both, those of `arrays` first."""
    return _like(arrays, (np.concatenate(pair) for pair in zip(arrays, more, strict=True)))


def _like(arrays: Arrays, parts: Any) -> Arrays:
    return type(arrays)(*parts)
