"""The feature values of whole texts, token by token, for commands that judge or record them.

An engine receives which features to read, not by which policies. So it needs to know nothing about
a text but its tokens: where the output begins, which roles there are and what is judged is up to
the command. `saeguard.guard.judge` judges the values of one text, whichever engine read them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from saeguard.guard.evaluate import ERROR, EVALUATED, MASSIVE, SPECIAL, Tokens

CELLS = 2**26
"""Most values of texts that are read or wait to be judged at a time: 256 MiB."""


class Reading(NamedTuple):
    """The values of some features at every token of one text."""

    values: np.ndarray
    """[tokens, features] float32; NaN at tokens that could not be read."""
    state: np.ndarray
    """[tokens] uint8: `EVALUATED`, `SPECIAL`, `MASSIVE` or `ERROR` of `saeguard.guard.evaluate`."""

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

    def take(self, request_ids: Sequence[str], tokens: Tokens) -> None:
        """Add a block of tokens that the ledger advances; other requests are passed over."""
        for i, request_id in enumerate(request_ids):
            parts = self._parts.get(request_id)
            if parts is not None:
                read = reading_of(*(part[i] for part in tokens[1:]))
                parts.append((int(tokens.position[i, 0]), read))

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
