"""What was seen of tokens whose KV may be read again, by the engine's own key of their block.

A prefix-cache hit skips the forward pass, so nothing is seen of those tokens again. The engine
finds a hit by a key that hashes everything the block's KV depends on: every token up to its end,
adapter, images, salt. Equal keys mean equal activations, wherever the KV lies by now, so what
was seen is kept under the same key. Nothing can go stale: a block that is evicted and filled
with another text has another key, and KV that comes back from an offload tier has its old one.

Only what fired is kept, exactly (float32): a verdict over a cached prompt is the one it would
have had without the cache.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

ENTRY_BYTES = 400
"""What an entry costs beside what fired: key, tuple and array headers."""
SWEEP = 4
"""Old entries looked at for each new one, once there are more than the KV cache has blocks."""


class Seen(NamedTuple):
    """One block of tokens."""

    at: np.ndarray
    """[fired] uint32 index into the flattened [block, columns] activations."""
    value: np.ndarray
    """[fired] float32."""
    eligible: np.ndarray
    """[block / 8] uint8: bits of the tokens that are not excluded by id."""
    made: int = 0
    """Swap of the watch list after which it was seen."""

    @property
    def nbytes(self) -> int:
        """Return the bytes that the entry holds."""
        return ENTRY_BYTES + self.at.nbytes + self.value.nbytes + self.eligible.nbytes


class PrefixStore:
    """Watched activations of whole blocks, bounded in entries by the KV cache and in bytes."""

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
            block: tokens a key stands for.
            columns: watched rows.
            blocks: keys that the KV cache can hold at once.
            limit_bytes: what the memory may hold; the oldest entries go first.
            in_cache: whether the KV cache still has a key; what it has is kept.
        """
        self.block = block
        self.columns = columns
        self.blocks = blocks
        self.limit_bytes = limit_bytes
        self.nbytes = 0
        self.dropped = 0
        """Entries let go for want of room; their tokens count as not evaluated when reused."""
        self._in_cache = in_cache
        self._seen: OrderedDict[bytes, Seen] = OrderedDict()

    def __len__(self) -> int:
        """Return the number of blocks remembered."""
        return len(self._seen)

    @property
    def worst_bytes(self) -> int:
        """Return what it would hold if every latent fired on every token of the cache."""
        block = 8 * self.block * self.columns + self.block // 8 + ENTRY_BYTES
        return self.blocks * block

    def holds(self, keys: Sequence[bytes], needs: int = 0) -> bool:
        """Return whether all of the blocks were seen, by a list of swap `needs` or later."""
        return all(key in self._seen and self._seen[key].made >= needs for key in keys)

    def put(
        self, keys: Sequence[bytes], f: np.ndarray, eligible: np.ndarray, made: int = 0
    ) -> None:
        """Remember whole blocks.

        Args:
            keys: one a block.
            f: [blocks, block, columns] float32 activations.
            eligible: [blocks, block] bool.
            made: swap of the watch list after which they were seen.
        """
        flat = f.reshape(len(keys), -1)
        which, at = np.nonzero(flat)  # NaN is not zero: what could not be read stays an error
        value = flat[which, at]
        ends = np.searchsorted(which, np.arange(len(keys) + 1))
        bits = np.packbits(eligible, axis=1)
        for i, key in enumerate(keys):
            part = slice(ends[i], ends[i + 1])
            fired = at[part].astype(np.uint32), value[part].copy()
            self._keep(key, Seen(*fired, bits[i].copy(), made))

    def get(self, key: bytes, needs: int = 0) -> tuple[np.ndarray, np.ndarray] | None:
        """Return activations [block, columns] and watched [block] of a block, None if unknown.

        So it is, too, where it was seen before swap `needs`, by a list without the rows wanted.
        """
        seen = self._seen.get(key)
        if seen is None or seen.made < needs:
            return None
        self._seen.move_to_end(key)
        f = np.zeros(self.block * self.columns, np.float32)
        f[seen.at] = seen.value
        eligible = np.unpackbits(seen.eligible, count=self.block).astype(bool)
        return f.reshape(self.block, self.columns), eligible

    def clear(self) -> None:
        """Forget everything: the weights may have changed, or the watch list."""
        self._seen.clear()
        self.nbytes = 0

    def _keep(self, key: bytes, seen: Seen) -> None:
        old = self._seen.get(key)
        if old is not None and old.made > seen.made:  # a request that began before the swap
            return
        self._seen.pop(key, None)
        self.nbytes += seen.nbytes - (old.nbytes if old else 0)
        self._seen[key] = seen
        # At most `blocks` of the entries can be in the cache, so where there are twice as many,
        # a few looks at the old end find one that is not, without ever walking over all.
        for _ in range(SWEEP if len(self._seen) > 2 * self.blocks else 0):
            oldest = next(iter(self._seen))
            if self._in_cache(oldest):
                self._seen.move_to_end(oldest)
            else:
                self.nbytes -= self._seen.pop(oldest).nbytes
        while self.nbytes > self.limit_bytes and self._seen:
            _, gone = self._seen.popitem(last=False)
            self.nbytes -= gone.nbytes
            self.dropped += 1


class PrefixView(NamedTuple):
    """The memory as one watch list uses it: what its passes see, and what it can read."""

    prefix_store: PrefixStore
    made: int
    """Swap that brought the list: its requests' passes hold all columns written up to then."""
    needs: int
    """Swap after which all that it reads is in every pass."""

    @property
    def block(self) -> int:
        """Return the tokens that a key stands for."""
        return self.prefix_store.block

    def holds(self, keys: Sequence[bytes]) -> bool:
        """Return whether all of the blocks were seen."""
        return self.prefix_store.holds(keys, self.needs)

    def put(self, keys: Sequence[bytes], f: np.ndarray, eligible: np.ndarray) -> None:
        """Remember whole blocks, as `Memory.put` does."""
        self.prefix_store.put(keys, f, eligible, self.made)

    def get(self, key: bytes) -> tuple[np.ndarray, np.ndarray] | None:
        """Return a block, as `Memory.get` does."""
        return self.prefix_store.get(key, self.needs)
