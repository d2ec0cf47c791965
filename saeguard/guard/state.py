"""The arrays behind the ledger: one row a request slot, so that a step is a few operations."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from saeguard.guard.watchlist import WatchList


@dataclass(frozen=True, slots=True)
class Terms:
    """The selections of all policies in one row: whose, of which feature, above what."""

    policy: np.ndarray
    feature: np.ndarray
    above: np.ndarray
    name: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class State:
    """Struct of arrays over request slots; `P` policies, `Q` terms."""

    next: np.ndarray
    """[slots] the position expected next; what lies before it has been accounted for."""
    prompt: np.ndarray
    """[slots] prompt tokens."""
    counts: np.ndarray
    """[slots, prompt or output, evaluated or why not] tokens."""
    score: np.ndarray
    """[slots, P] highest window score."""
    first: np.ndarray
    """[slots, P] position of the first match, -1 before it."""
    matched: np.ndarray
    """[slots, P] tokens on which the policy was on."""
    on_until: np.ndarray
    """[slots, P] last position kept on by the latest match."""
    acted: np.ndarray
    """[slots, P] bool: a clamp edited a row."""
    enforced: np.ndarray
    """[slots, P] bool."""
    ring: np.ndarray
    """[slots, longest window, P] evidence by `position % longest window`."""
    fired: np.ndarray
    """[slots, Q] tokens above the selection's threshold."""
    peak: np.ndarray
    """[slots, Q] highest share."""
    peak_at: np.ndarray
    """[slots, Q] its position."""
    noted: np.ndarray
    """[slots] the position behind the last row that went into `recent`."""
    whole_from: np.ndarray
    """[slots] the position from which on no row is missing before `noted`."""
    recent: np.ndarray
    """[slots, block, columns] activations of the block under way, by `position % block`."""
    recent_watched: np.ndarray
    """[slots, block] bool."""


def make_state(
    slots: int, *, policies: int, terms: int, longest: int, block: int, columns: int
) -> State:
    """Return the state of `slots` requests of which nothing was seen.

    Args:
        slots: requests.
        policies: P.
        terms: Q.
        longest: tokens of the longest window.
        block: tokens of a block of the prefix cache, 0 where there is none.
        columns: watched rows.
    """

    def full(value: Any, *shape: int, dtype: Any = np.int64) -> np.ndarray:
        return np.full((slots, *shape), value, dtype)

    return State(
        next=full(0),
        prompt=full(0),
        counts=full(0, 2, 5),
        score=full(-np.inf, policies, dtype=np.float64),
        first=full(-1, policies),
        matched=full(0, policies),
        on_until=full(-1, policies),
        acted=full(False, policies, dtype=bool),
        enforced=full(False, policies, dtype=bool),
        ring=full(-np.inf, longest if longest > 1 else 0, policies, dtype=np.float64),
        fired=full(0, terms),
        peak=full(-np.inf, terms, dtype=np.float32),
        peak_at=full(-1, terms),
        noted=full(0),
        whole_from=full(0),
        recent=full(0.0, block, columns, dtype=np.float32),
        recent_watched=full(False, block, dtype=bool),
    )


def write_slot(state: State, slot: int, other: State, at: int = 0) -> None:
    """Overwrite one slot with slot `at` of another state."""
    for field in fields(State):
        getattr(state, field.name)[slot] = getattr(other, field.name)[at]


def copy_slot(state: State, slot: int) -> State:
    """Return a state of one slot that holds what `slot` holds."""
    return State(*(getattr(state, f.name)[slot : slot + 1].copy() for f in fields(State)))


def grown(state: State, more: State) -> State:
    """Return the slots of both."""
    return State(
        *(np.concatenate([getattr(s, f.name) for s in (state, more)]) for f in fields(State))
    )


def make_terms(watchlist: WatchList) -> Terms:
    """Return the selections of all policies in one row."""
    rows = [
        (
            i,
            watchlist.selection_feature[j],
            watchlist.selection_above[j],
            policy.detect[name].feature,
        )
        for i, (policy, names) in enumerate(
            zip(watchlist.policies, watchlist.policy_selections, strict=True)
        )
        for name, j in names.items()
    ]
    policy, feature, above, name = zip(*rows, strict=True) if rows else ((), (), (), ())
    return Terms(
        np.array(policy, np.intp), np.array(feature, np.intp), np.array(above, np.float64), name
    )
