"""Store the fired latents of blocks in vLLM's prefix cache, by vLLM's own block hash.

A prefix-cache hit skips the forward pass, so the tap does not read those tokens again. vLLM finds a
hit by a hash of everything that the block's KV depends on: every token up to its end, adapter,
images, salt. Equal hashes mean equal activations, wherever the KV lies, so the activations are
stored by the same hash. No entry can become stale: a block that is evicted and filled with another
text has another hash, and KV that returns from an offload tier has its old hash.

Only latents that fired are stored, exactly (float32). So the verdict over a cached prompt equals
the verdict without the cache.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

ENTRY_BYTES = 400
"""Bytes of an entry beside the fired latents: key, tuple and array headers."""
SWEEP = 4
"""Old entries examined for each new one, once there are twice as many as the cache has blocks."""


class StoredBlock(NamedTuple):
    """The fired latents of one block of tokens."""

    at: np.ndarray
    """[fired] uint32 index into the flattened [block, columns] activations."""
    value: np.ndarray
    """[fired] float32."""
    eligible: np.ndarray
    """[block / 8] uint8, one bit per token: it is not excluded by id."""
    made: int = 0
    """Number of the last swap before the block was read."""

    @property
    def nbytes(self) -> int:
        """Return the bytes that the entry holds."""
        return ENTRY_BYTES + self.at.nbytes + self.value.nbytes + self.eligible.nbytes


class PrefixStore:
    """Watched activations of full blocks, limited by the size of the KV cache and in bytes."""

    def __init__(
        self,
        block: int,
        columns: int,
        *,
        blocks: int,
        limit_bytes: int,
        in_cache: Callable[[bytes], bool] = lambda _key: True,
    ) -> None:
        """Start empty.

        Args:
            block: tokens of a block, which one key identifies.
            columns: encoder rows, over all layers.
            blocks: number of blocks that the KV cache holds.
            limit_bytes: most bytes of all entries; the oldest entries are dropped first.
            in_cache: returns whether the KV cache still has a key; such entries are not swept out.
        """
        self.block = block
        self.columns = columns
        self.blocks = blocks
        self.limit_bytes = limit_bytes
        self.nbytes = 0
        self.dropped = 0
        """Entries dropped for lack of room; their tokens count as not evaluated if reused."""
        self._in_cache = in_cache
        self._blocks: OrderedDict[bytes, StoredBlock] = OrderedDict()

    def __len__(self) -> int:
        """Return the number of stored blocks."""
        return len(self._blocks)

    @property
    def worst_bytes(self) -> int:
        """Return the bytes that a full cache needs if every latent fires on every token."""
        block = 8 * self.block * self.columns + self.block // 8 + ENTRY_BYTES
        return self.blocks * block

    def holds(self, keys: Sequence[bytes], needs: int = 0) -> bool:
        """Return whether all of the blocks are stored, read after swap `needs` or later."""
        return all(key in self._blocks and self._blocks[key].made >= needs for key in keys)

    def put(
        self, keys: Sequence[bytes], f: np.ndarray, eligible: np.ndarray, made: int = 0
    ) -> None:
        """Record full blocks.

        Args:
            keys: the block hashes.
            f: [blocks, block, columns] float32 activations.
            eligible: [blocks, block] bool.
            made: number of the last swap before they were read.
        """
        flat = f.reshape(len(keys), -1)
        which, at = np.nonzero(flat)  # NaN is not 0, so an unreadable token stays an error
        value = flat[which, at]
        ends = np.searchsorted(which, np.arange(len(keys) + 1))
        bits = np.packbits(eligible, axis=1)
        for i, key in enumerate(keys):
            part = slice(ends[i], ends[i + 1])
            fired = at[part].astype(np.uint32), value[part].copy()
            self._keep(key, StoredBlock(*fired, bits[i].copy(), made))

    def get(self, key: bytes, needs: int = 0) -> tuple[np.ndarray, np.ndarray] | None:
        """Return activations [block, columns] and eligible [block] of a block; None if unknown.

        It counts as unknown if it was read before swap `needs`, when the taps lacked wanted rows.
        """
        stored = self._blocks.get(key)
        if stored is None or stored.made < needs:
            return None
        self._blocks.move_to_end(key)
        f = np.zeros(self.block * self.columns, np.float32)
        f[stored.at] = stored.value
        eligible = np.unpackbits(stored.eligible, count=self.block).astype(bool)
        return f.reshape(self.block, self.columns), eligible

    def clear(self) -> None:
        """Drop all entries, since the weights or the watch list may have changed."""
        self._blocks.clear()
        self.nbytes = 0

    def _keep(self, key: bytes, stored: StoredBlock) -> None:
        old = self._blocks.get(key)
        if (
            old is not None and old.made > stored.made
        ):  # read by a request that began before the swap
            return
        self._blocks.pop(key, None)
        self.nbytes += stored.nbytes - (old.nbytes if old else 0)
        self._blocks[key] = stored
        # The KV cache has at most `blocks` of the entries. If there are twice as many, examine a
        # few of the oldest and drop those that it no longer has, without a walk over all.
        for _ in range(SWEEP if len(self._blocks) > 2 * self.blocks else 0):
            oldest = next(iter(self._blocks))
            if self._in_cache(oldest):
                self._blocks.move_to_end(oldest)
            else:
                self.nbytes -= self._blocks.pop(oldest).nbytes
        while self.nbytes > self.limit_bytes and self._blocks:
            _, gone = self._blocks.popitem(last=False)
            self.nbytes -= gone.nbytes
            self.dropped += 1


class PrefixView(NamedTuple):
    """The prefix store as one version of the watch list writes and reads it."""

    prefix_store: PrefixStore
    made: int
    """Number of the swap that brought the version; its passes hold the columns written by then."""
    needs: int
    """Number of the swap after which every forward pass holds all columns that it reads."""

    @property
    def block(self) -> int:
        """Return the tokens of a block."""
        return self.prefix_store.block

    def holds(self, keys: Sequence[bytes]) -> bool:
        """Return whether all of the blocks are stored; see `PrefixStore.holds`."""
        return self.prefix_store.holds(keys, self.needs)

    def put(self, keys: Sequence[bytes], f: np.ndarray, eligible: np.ndarray) -> None:
        """Record full blocks; see `PrefixStore.put`."""
        self.prefix_store.put(keys, f, eligible, self.made)

    def get(self, key: bytes) -> tuple[np.ndarray, np.ndarray] | None:
        """Return a block; see `PrefixStore.get`."""
        return self.prefix_store.get(key, self.needs)
