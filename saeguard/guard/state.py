"""The rules' state of all requests in flight: arrays with one entry per slot of the ledger."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from saeguard.guard.compiled_rules import Rules
from saeguard.guard.scopes import ROLES

FATES = 6
"""Number of things that can become of a token; see `evaluate.EVALUATED`."""


@dataclass(frozen=True, slots=True)
class State:
    """Arrays over the ledger's slots; `P` policies, `Q` terms of the rules."""

    next: np.ndarray
    """[slots] the next position; every token before it was evaluated or skipped."""
    prompt: np.ndarray
    """[slots] prompt tokens."""
    roles: np.ndarray
    """[slots] arrays [prompt tokens] of indices into `ROLES`; None if no policy needs them."""
    counts: np.ndarray
    """[slots, roles, FATES] tokens evaluated, then skipped by reason; see `evaluate.EVALUATED`."""
    score: np.ndarray
    """[slots, P] highest score so far."""
    first: np.ndarray
    """[slots, P] position of the first match, -1 before it."""
    matched: np.ndarray
    """[slots, P] tokens on which the policy was on."""
    on_until: np.ndarray
    """[slots, P] last position at which the matches so far keep the policy on, or -1."""
    acted: np.ndarray
    """[slots, P] bool: a clamp edited a row."""
    enforced: np.ndarray
    """[slots, P] bool."""
    sampled: np.ndarray
    """[slots, P] bool: the policy looks at this request."""
    ring: np.ndarray
    """[slots, longest window, windowed] evidence by `position % longest window`."""
    best: np.ndarray
    """[slots, largest k, counted] the largest evidence values so far, ascending."""
    past: np.ndarray
    """[slots, longest, aggregates of a window] shares by `position % longest`."""
    level: np.ndarray
    """[slots, other aggregates] averages, maxima and sums so far."""
    summed: np.ndarray
    """[slots, means so far] tokens in the sums."""
    last: np.ndarray
    """[slots, policies with `for: the last token`] position of the last token in scope, or -1."""
    fired: np.ndarray
    """[slots, Q] tokens above the selection's threshold."""
    peak: np.ndarray
    """[slots, Q] highest share."""
    peak_at: np.ndarray
    """[slots, Q] position of the highest share."""
    recorded: np.ndarray
    """[slots] the position after the last row that was recorded."""
    whole_from: np.ndarray
    """[slots] the position from which on every row before `recorded` was read."""
    recent: np.ndarray
    """[slots, 2 blocks, columns] activations of the unfinished block, by `position % (2 * block)`.
    There is room for two blocks, since several passes are recorded at once."""
    recent_eligible: np.ndarray
    """[slots, 2 blocks] bool."""


def make_state(rules: Rules, slots: int, *, block: int = 0, columns: int = 0) -> State:
    """Return the state of `slots` requests without evaluated tokens.

    Args:
        rules: the compiled policies.
        slots: requests.
        block: tokens of a block of the prefix cache, 0 without a cache.
        columns: encoder rows, over all layers.
    """
    policies, terms, over = len(rules.policies), len(rules.terms.trace), rules.aggregates
    windowed = max((which.stop for *_, which in over.windows), default=0)

    def full(value: Any, *shape: int, dtype: Any = np.int64) -> np.ndarray:
        return np.full((slots, *shape), value, dtype)

    state = State(
        next=full(0),
        prompt=full(0),
        roles=full(None, dtype=object),
        counts=full(0, len(ROLES), FATES),
        score=full(-np.inf, policies, dtype=np.float64),
        first=full(-1, policies),
        matched=full(0, policies),
        on_until=full(-1, policies),
        acted=full(False, policies, dtype=bool),
        enforced=full(False, policies, dtype=bool),
        sampled=full(True, policies, dtype=bool),
        ring=full(-np.inf, rules.windowed.longest, len(rules.windowed.policy), dtype=np.float64),
        best=full(
            -np.inf,
            int(rules.counted.k.max(initial=0)),
            len(rules.counted.policy),
            dtype=np.float64,
        ),
        past=full(0.0, over.longest, windowed, dtype=np.float64),
        level=full(0.0, len(over.feature) - windowed, dtype=np.float64),
        summed=full(0, over.whole.stop - over.whole.start),
        last=full(-1, len(rules.last.policy)),
        fired=full(0, terms),
        peak=full(-np.inf, terms, dtype=np.float64),
        peak_at=full(-1, terms),
        recorded=full(0),
        whole_from=full(0),
        recent=full(0.0, 2 * block, columns, dtype=np.float32),
        recent_eligible=full(False, 2 * block, dtype=bool),
    )
    state.past[:] = over.missing[:windowed]
    state.level[:] = over.missing[windowed:]
    return state


def blank(like: State, slots: int) -> State:
    """Return an uninitialised state of `slots` requests; a slot is written before it is read.

    Uninitialised memory costs nothing until it is written, however many slots there are.
    """
    arrays = (getattr(like, f.name) for f in fields(State))
    return State(*(np.empty((slots, *a.shape[1:]), a.dtype) for a in arrays))


def write_slot(state: State, slot: int, other: State, at: int = 0) -> None:
    """Overwrite one slot with slot `at` of another state."""
    for field in fields(State):
        getattr(state, field.name)[slot] = getattr(other, field.name)[at]


def copy_slot(state: State, slot: int) -> State:
    """Return a state of one slot, a copy of `slot`."""
    return State(*(getattr(state, f.name)[slot : slot + 1].copy() for f in fields(State)))


def grown(state: State, more: State) -> State:
    """Return a state with the slots of both, those of `state` first."""
    return State(
        *(np.concatenate([getattr(s, f.name) for s in (state, more)]) for f in fields(State))
    )
