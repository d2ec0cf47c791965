"""Find hits: policies that match a request for the first time, or could not read a token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from saeguard.guard.compiled_rules import Rules
from saeguard.guard.evaluate import Tokens, roles_at
from saeguard.guard.scopes import in_scopes
from saeguard.guard.state import State


class Hit(NamedTuple):
    """One policy's first match on a request, or its first unread token in a block."""

    request_id: str
    policy: int
    """Index into the watch list's policies."""
    position: int
    error: bool = False
    """True if a token in scope could not be read, False if the policy matched."""


def matched(ids: Sequence[str], first: np.ndarray | None) -> list[Hit]:
    """Return the first matches of a block; `first` is what `evaluate.advance` returned."""
    if first is None:
        return []
    return [Hit(ids[r], int(p), int(first[r, p])) for r, p in np.argwhere(first >= 0)]


def unread(
    rules: Rules,
    s: State,
    slots: np.ndarray,
    ids: Sequence[str],
    tokens: Tokens,
    wanted: np.ndarray,
) -> list[Hit]:
    """Return a hit for each policy that could not read a token in its scope.

    Args:
        rules: the compiled policies.
        s: the state.
        slots: [requests].
        ids: of the requests.
        tokens: the block.
        wanted: [P] bool: the policies to look at.
    """
    if tokens.finite.all() or not wanted.any():
        return []
    role = roles_at(s, slots, tokens.position)
    missed = in_scopes(role, tokens.eligible & ~tokens.finite)[..., rules.scope]
    missed &= wanted & s.sampled[slots, None]
    where = missed.argmax(axis=1)
    return [
        Hit(ids[r], int(p), int(tokens.position[r, where[r, p]]), error=True)
        for r, p in np.argwhere(missed.any(axis=1))
    ]
