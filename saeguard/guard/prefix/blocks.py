"""From rows as passes bring them to whole blocks of the prefix cache, and back again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from saeguard.guard.prefix.store import PrefixStore, PrefixView
from saeguard.guard.state import State

RECALLED_ROWS = 4096
"""Cached tokens recalled at once, which bounds what a long prompt holds."""


class Whole(NamedTuple):
    """A block whose rows are all there."""

    slot: int
    i: int
    """Which of its request's blocks."""
    f: np.ndarray
    """[block, columns] float32."""
    eligible: np.ndarray


class PrefixBlocks:
    """What the requests in flight have seen of their blocks, on its way into the memory."""

    def __init__(self, prefix_store: PrefixStore | PrefixView) -> None:
        """Start with no request."""
        self.prefix_store = prefix_store
        self._keys: dict[int, Sequence[bytes]] = {}
        """By slot: the keys of its whole blocks, a list that the engine extends."""
        self._unkeyed: list[Whole] = []
        """Whole blocks whose key is not there yet."""

    def admit(self, slot: int, keys: Sequence[bytes]) -> None:
        """Start a request."""
        self._keys[slot] = keys

    def forget(self, slot: int) -> None:
        """End a request; blocks without a key cannot be found again."""
        self._unkeyed = [whole for whole in self._unkeyed if whole.slot != slot]
        self._keys.pop(slot)

    def take_back(self, slot: int, seen: int) -> None:
        """Drop what was noted of a request from position `seen` on."""
        block = self.prefix_store.block
        self._unkeyed = [w for w in self._unkeyed if w.slot != slot or (w.i + 1) * block <= seen]

    def recall(
        self, slot: int, first: int, end: int
    ) -> tuple[int, tuple[np.ndarray, np.ndarray] | None]:
        """Return what is remembered of cached tokens `first`, ... before `end`.

        Returns:
            The position behind what is returned, and activations and watched, or None where the
            tokens up to there are not remembered.
        """
        block, keys, i = self.prefix_store.block, self._keys[slot], first // self.prefix_store.block
        found: list[tuple[np.ndarray, np.ndarray]] = []
        for key in keys[i : min(end // block, i + RECALLED_ROWS // block)]:
            seen = self.prefix_store.get(key)
            if seen is None:
                break
            found.append(seen)
        if not found:
            return min(end, (i + 1) * block), None
        f, eligible = (
            np.concatenate(part)[first - i * block :] for part in zip(*found, strict=True)
        )
        return (i + len(found)) * block, (f, eligible)

    def note(
        self,
        s: State,
        at: np.ndarray,
        position: np.ndarray,
        f: np.ndarray,
        eligible: np.ndarray,
        *,
        ran: bool,
    ) -> None:
        """Keep at most a block of consecutive rows of each of several slots.

        Args:
            s: the state.
            at: [requests] slots.
            position: [requests, tokens].
            f: [requests, tokens, columns].
            eligible: [requests, tokens].
            ran: whether the activations were read.
        """
        block = self.prefix_store.block
        first, end = position[:, 0], position[:, -1] + 1
        jumped = first != s.noted[at]
        s.whole_from[at[jumped]] = first[jumped]
        s.noted[at] = end
        if not ran:
            s.whole_from[at] = end
            return
        inside = position % (2 * block)
        s.recent[at[:, None], inside] = f
        s.recent_eligible[at[:, None], inside] = eligible
        for r, j in np.argwhere(position % block == block - 1):
            self._complete(s, int(at[r]), int(position[r, j]) // block)
        self.store()

    def note_run(
        self,
        s: State,
        slot: int,
        position: np.ndarray,
        f: np.ndarray,
        eligible: np.ndarray,
        *,
        ran: bool,
    ) -> None:
        """Keep consecutive rows of one slot: whole blocks now, the rest until theirs is."""
        block = self.prefix_store.block
        first, end = int(position[0]), int(position[-1]) + 1
        if first != s.noted[slot]:
            s.whole_from[slot] = first
        s.noted[slot] = end
        if not ran:
            s.whole_from[slot] = end
            return
        start = min(end, -(-first // block) * block)  # of the whole blocks, if there is one
        stop = max(start, end // block * block)
        self._keep(s, slot, position[: start - first], f, eligible)
        if start > first and start % block == 0:
            self._complete(s, slot, start // block - 1)
        for o in range(start - first, stop - first, block):
            rows = slice(o, o + block)
            self._unkeyed.append(Whole(slot, (first + o) // block, f[rows], eligible[rows]))
        rest = slice(stop - first, None)
        self._keep(s, slot, position[rest], f[rest], eligible[rest])
        self.store()

    def store(self) -> None:
        """Remember the whole blocks whose key the engine has made; drafts have none yet."""
        if not self._unkeyed:
            return
        ready = [w for w in self._unkeyed if w.i < len(self._keys[w.slot])]
        self._unkeyed = [w for w in self._unkeyed if w.i >= len(self._keys[w.slot])]
        if ready:
            self.prefix_store.put(
                [self._keys[w.slot][w.i] for w in ready],
                np.stack([w.f for w in ready]),
                np.stack([w.eligible for w in ready]),
            )

    def _keep(
        self, s: State, slot: int, position: np.ndarray, f: np.ndarray, eligible: np.ndarray
    ) -> None:
        inside = position % (2 * self.prefix_store.block)
        s.recent[slot, inside] = f[: len(inside)]
        s.recent_eligible[slot, inside] = eligible[: len(inside)]

    def _complete(self, s: State, slot: int, i: int) -> None:
        """Take a block whose last row has come, if none of its rows is missing."""
        block = self.prefix_store.block
        if s.whole_from[slot] <= i * block:
            rows = slice(i % 2 * block, (i % 2 + 1) * block)
            self._unkeyed.append(
                Whole(slot, i, s.recent[slot, rows].copy(), s.recent_eligible[slot, rows].copy())
            )
