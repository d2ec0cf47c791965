"""The feature values of whole texts, token by token, for commands that judge or record them.

An engine receives which features to read, not by which policies. So it needs to know nothing about
a text but its tokens: where the output begins, which roles there are and what is judged is up to
the command. `saeguard.guard.judge` judges the values of one text, whichever engine read them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from saeguard.guard.forward_pass import ForwardPass
from saeguard.guard.tables import ERROR, EVALUATED, MASSIVE, SPECIAL
from saeguard.guard.watchlist import ReadRows

CELLS = 2**26
"""Most values of texts that are read or wait to be judged at a time: 256 MiB."""


class Reading(NamedTuple):
    """The values of some features at every token of one text."""

    values: np.ndarray
    """[tokens, features] float32; NaN at tokens that could not be read."""
    state: np.ndarray
    """[tokens] uint8: `EVALUATED`, `SPECIAL`, `MASSIVE` or `ERROR` of `saeguard.guard.tables`."""

    @property
    def evaluable(self) -> np.ndarray:
        """Return [tokens] bool: false for tokens that the feature sets exclude."""
        wanted: np.ndarray = self.state != SPECIAL
        return wanted

    @property
    def massive(self) -> np.ndarray:
        """Return [tokens] bool: true for attention sinks."""
        found: np.ndarray = self.state == MASSIVE
        return found


def reading_of(
    values: np.ndarray,
    eligible: np.ndarray,
    finite: np.ndarray,
    massive: np.ndarray,
) -> Reading:
    """Return the reading of consecutive tokens.

    Args:
        values: [tokens, features] float32.
        eligible: [tokens] bool, False for tokens that are excluded by id.
        finite: [tokens] bool, False if the token's activations could not be read.
        massive: [tokens] bool, True for attention sinks.
    """
    read = np.where(finite, np.where(massive, MASSIVE, EVALUATED), ERROR)
    state = np.where(eligible, read, SPECIAL).astype(np.uint8)
    kept = np.where(finite[:, None], values, np.float32(np.nan)).astype(np.float32, copy=False)
    return Reading(kept, state)


class Readings:
    """Collects the readings of the requests in flight of an engine core."""

    def __init__(self) -> None:
        """Start without requests."""
        self._parts: dict[str, list[tuple[int, Reading]]] = {}

    def admit(self, request_id: str) -> None:
        """Start to collect a request's values."""
        self._parts[request_id] = []

    def take(self, request_id: str, position: int, read: Reading) -> None:
        """Add consecutive tokens from `position` on; other requests are passed over."""
        parts = self._parts.get(request_id)
        if parts is not None:
            parts.append((position, read))

    def take_pass(
        self,
        forward_pass: ForwardPass,
        read: ReadRows,
        valid: np.ndarray,
        next_position: Callable[[str], int],
    ) -> None:
        """Add the rows of a forward pass that follow what was evaluated, and were not themselves.

        Args:
            forward_pass: of the requests.
            read: of its rows.
            valid: [requests] leading rows that count; 0 for a request to pass over.
            next_position: returns a request's first position that was not evaluated yet.
        """
        for i in np.flatnonzero(valid).tolist():
            request_id, start = forward_pass.request_ids[i], int(forward_pass.query_start[i])
            first = int(forward_pass.positions[start])
            fresh = next_position(request_id) - first
            if fresh < 0:
                continue
            rows = slice(start + fresh, start + int(valid[i]))
            eligible = forward_pass.eligible[rows]
            part = reading_of(read.shares[rows], eligible, read.finite[rows], read.massive[rows])
            self.take(request_id, first + fresh, part)

    def pop(self, request_id: str, tokens: int) -> Reading | None:
        """End a request, and return the reading of its first `tokens` tokens.

        It is shorter if a token was not read: it ends before that token. None for a request that
        was not admitted, or of which nothing was read.
        """
        whole: list[Reading] = []
        end = 0
        for position, read in self._parts.pop(request_id, ()):
            if position != end:
                break
            whole.append(read)
            end += len(read.state)
        if not whole:
            return None
        values, state = (np.concatenate(parts)[:tokens] for parts in zip(*whole, strict=True))
        return Reading(values, state)


def most_tokens(features: int) -> int:
    """Return how many tokens may be read or wait at a time, so that `CELLS` values suffice."""
    return max(1, CELLS // max(1, features))
