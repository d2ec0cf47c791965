"""Collect the rows of forward passes into full blocks of the prefix cache, and recall them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from saeguard.guard.forward_pass import ForwardPass
from saeguard.guard.prefix.store import PrefixStore, PrefixView

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


class Recent(NamedTuple):
    """The rows of unfinished blocks, by slot."""

    recorded: np.ndarray
    """[slots] the position after the last row that was recorded."""
    whole_from: np.ndarray
    """[slots] the position from which on every row before `recorded` was read."""
    f: np.ndarray
    """[slots, block, columns] float32 activations of the unfinished block, by
    `position % block`."""
    eligible: np.ndarray
    """[slots, block] bool."""


def make_recent(slots: int, block: int, columns: int) -> Recent:
    """Return the rows of `slots` requests of which none is recorded."""
    return Recent(
        np.zeros(slots, np.int64),
        np.zeros(slots, np.int64),
        np.zeros((slots, block, columns), np.float32),
        np.zeros((slots, block), bool),
    )


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

    def record_pass(
        self, recent: Recent, forward_pass: ForwardPass, slots: np.ndarray, valid: np.ndarray
    ) -> None:
        """Record the valid rows of a forward pass, of the requests whose slot is not -1."""
        which = np.flatnonzero((slots >= 0) & (valid == 1))
        rows = forward_pass.query_start[which]
        if len(which):
            self._record_one_each(recent, slots[which], forward_pass, rows)
        for i in np.flatnonzero((slots >= 0) & (valid > 1)).tolist():
            start = int(forward_pass.query_start[i])
            self._record_run(
                recent, int(slots[i]), forward_pass, slice(start, start + int(valid[i]))
            )
        self.store()

    def _record_one_each(
        self, recent: Recent, slots: np.ndarray, forward_pass: ForwardPass, rows: np.ndarray
    ) -> None:
        """Record one row of each of several slots."""
        block, position = self.prefix_store.block, forward_pass.positions[rows]
        jumped = position != recent.recorded[slots]
        recent.whole_from[slots[jumped]] = position[jumped]
        recent.recorded[slots] = position + 1
        if not forward_pass.ran:
            recent.whole_from[slots] = position + 1
            return
        recent.f[slots, position % block] = forward_pass.f[rows]
        recent.eligible[slots, position % block] = forward_pass.eligible[rows]
        for r in np.flatnonzero(position % block == block - 1).tolist():
            self._complete(recent, int(slots[r]), int(position[r]) // block)

    def _record_run(
        self, recent: Recent, slot: int, forward_pass: ForwardPass, rows: slice
    ) -> None:
        """Record consecutive rows of one slot; rows of an unfinished block wait."""
        block, position = self.prefix_store.block, forward_pass.positions[rows]
        first, end = int(position[0]), int(position[-1]) + 1
        if first != recent.recorded[slot]:
            recent.whole_from[slot] = first
        recent.recorded[slot] = end
        if not forward_pass.ran:
            recent.whole_from[slot] = end
            return
        f, eligible = forward_pass.f[rows], forward_pass.eligible[rows]
        start = min(end, -(-first // block) * block)  # of the first full block, if there is one
        stop = max(start, end // block * block)
        for part in (slice(0, start - first), slice(stop - first, None)):
            inside = position[part] % block
            recent.f[slot, inside] = f[part]
            recent.eligible[slot, inside] = eligible[part]
            if part.start == 0 and start > first and start % block == 0:
                self._complete(recent, slot, start // block - 1)
        for o in range(start - first, stop - first, block):
            here = slice(o, o + block)
            self._unkeyed.append(FullBlock(slot, (first + o) // block, f[here], eligible[here]))

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

    def _complete(self, recent: Recent, slot: int, index: int) -> None:
        """Add a block whose last row was just recorded, if all of its rows were read."""
        if recent.whole_from[slot] <= index * self.prefix_store.block:
            f, eligible = recent.f[slot].copy(), recent.eligible[slot].copy()
            self._unkeyed.append(FullBlock(slot, index, f, eligible))
