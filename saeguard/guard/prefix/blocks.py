"""Collect the rows of forward passes into full blocks of the prefix cache, and recall them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from saeguard.guard.prefix.store import PrefixStore, PrefixView
from saeguard.guard.state import State

RECALLED_ROWS = 4096
"""Most cached tokens recalled at once, which bounds the memory for a long prompt."""


class FullBlock(NamedTuple):
    """A block of which every row was read."""

    slot: int
    number: int
    """Index among the blocks of its request."""
    f: np.ndarray
    """[block, columns] float32."""
    eligible: np.ndarray
    """[block] bool."""


class PrefixBlocks:
    """Collects the full blocks of requests in flight until the prefix store takes them."""

    def __init__(self, prefix_store: PrefixStore | PrefixView) -> None:
        """Start without requests."""
        self.prefix_store = prefix_store
        self._keys: dict[int, Sequence[bytes]] = {}
        """By slot: the block hashes of its full blocks, a list that the engine extends."""
        self._unkeyed: list[FullBlock] = []
        """Full blocks that wait for the engine to compute their block hash."""

    def admit(self, slot: int, keys: Sequence[bytes]) -> None:
        """Start a request."""
        self._keys[slot] = keys

    def forget(self, slot: int) -> None:
        """End a request. Its blocks without a block hash are dropped: no request can reuse them."""
        self._unkeyed = [full for full in self._unkeyed if full.slot != slot]
        self._keys.pop(slot)

    def take_back(self, slot: int, position: int) -> None:
        """Drop the waiting blocks of a request that reach beyond `position`."""
        block = self.prefix_store.block
        self._unkeyed = [
            full
            for full in self._unkeyed
            if full.slot != slot or (full.number + 1) * block <= position
        ]

    def recall(
        self, slot: int, first: int, end: int
    ) -> tuple[int, tuple[np.ndarray, np.ndarray] | None]:
        """Return what the prefix store holds of the cached tokens at `first` to `end - 1`.

        Returns:
            The position after the tokens answered for; and their activations and `eligible`, or
            None if the prefix store does not hold these tokens.
        """
        block = self.prefix_store.block
        keys, i = self._keys[slot], first // block
        found: list[tuple[np.ndarray, np.ndarray]] = []
        for key in keys[i : min(end // block, i + RECALLED_ROWS // block)]:
            stored = self.prefix_store.get(key)
            if stored is None:
                break
            found.append(stored)
        if not found:
            return min(end, (i + 1) * block), None
        f, eligible = (
            np.concatenate(part)[first - i * block :] for part in zip(*found, strict=True)
        )
        return (i + len(found)) * block, (f, eligible)

    def record(
        self,
        s: State,
        slots: np.ndarray,
        position: np.ndarray,
        f: np.ndarray,
        eligible: np.ndarray,
        *,
        ran: bool,
    ) -> None:
        """Record consecutive rows of each of several slots, at most one block per slot.

        Args:
            s: the state.
            slots: [requests].
            position: [requests, tokens].
            f: [requests, tokens, columns].
            eligible: [requests, tokens].
            ran: whether the activations were read.
        """
        block = self.prefix_store.block
        first, end = position[:, 0], position[:, -1] + 1
        jumped = first != s.recorded[slots]
        s.whole_from[slots[jumped]] = first[jumped]
        s.recorded[slots] = end
        if not ran:
            s.whole_from[slots] = end
            return
        inside = position % (2 * block)
        s.recent[slots[:, None], inside] = f
        s.recent_eligible[slots[:, None], inside] = eligible
        for r, j in np.argwhere(position % block == block - 1):
            self._complete(s, int(slots[r]), int(position[r, j]) // block)
        self.store()

    def record_run(
        self,
        s: State,
        slot: int,
        position: np.ndarray,
        f: np.ndarray,
        eligible: np.ndarray,
        *,
        ran: bool,
    ) -> None:
        """Record consecutive rows of one slot; rows of an unfinished block wait in the state."""
        block = self.prefix_store.block
        first, end = int(position[0]), int(position[-1]) + 1
        if first != s.recorded[slot]:
            s.whole_from[slot] = first
        s.recorded[slot] = end
        if not ran:
            s.whole_from[slot] = end
            return
        start = min(end, -(-first // block) * block)  # of the first full block, if there is one
        stop = max(start, end // block * block)
        self._keep(s, slot, position[: start - first], f, eligible)
        if start > first and start % block == 0:
            self._complete(s, slot, start // block - 1)
        for o in range(start - first, stop - first, block):
            rows = slice(o, o + block)
            self._unkeyed.append(FullBlock(slot, (first + o) // block, f[rows], eligible[rows]))
        rest = slice(stop - first, None)
        self._keep(s, slot, position[rest], f[rest], eligible[rest])
        self.store()

    def store(self) -> None:
        """Move the full blocks that have a block hash by now to the prefix store.

        A block with draft tokens has none yet.
        """
        if not self._unkeyed:
            return
        ready = [full for full in self._unkeyed if full.number < len(self._keys[full.slot])]
        self._unkeyed = [
            full for full in self._unkeyed if full.number >= len(self._keys[full.slot])
        ]
        if ready:
            self.prefix_store.put(
                [self._keys[full.slot][full.number] for full in ready],
                np.stack([full.f for full in ready]),
                np.stack([full.eligible for full in ready]),
            )

    def _keep(
        self, s: State, slot: int, position: np.ndarray, f: np.ndarray, eligible: np.ndarray
    ) -> None:
        inside = position % (2 * self.prefix_store.block)
        s.recent[slot, inside] = f[: len(inside)]
        s.recent_eligible[slot, inside] = eligible[: len(inside)]

    def _complete(self, s: State, slot: int, index: int) -> None:
        """Add a block whose last row was just recorded, if all of its rows were read."""
        block = self.prefix_store.block
        if s.whole_from[slot] <= index * block:
            rows = slice(index % 2 * block, (index % 2 + 1) * block)
            f, eligible = s.recent[slot, rows].copy(), s.recent_eligible[slot, rows].copy()
            self._unkeyed.append(FullBlock(slot, index, f, eligible))
