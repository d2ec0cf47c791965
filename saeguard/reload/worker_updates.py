"""Send changes of the watch list from the engine core to the workers, with a step.

A worker update travels with vLLM's own `SchedulerOutput`, which reaches every rank once, in the
order of steps. So all ranks write the same columns before the same forward pass, without messages,
round trips or locks of the guard's own.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from saeguard.guard.install_taps import Write
from saeguard.guard.watchlist import WatchList


class Admitted(NamedTuple):
    """The clamps that may edit a request, and the roles of its prompt tokens."""

    clamps: str
    """Digest of the clamps of its version."""
    enforced: frozenset[tuple[str, str]]
    """Id and mode of each clamp policy that is enforced for the request."""
    roles: np.ndarray | None = None
    """[prompt tokens] role of each token; None if no policy needs them."""


class Swap(NamedTuple):
    """The changes on the device that new versions need, in one swap or several merged ones."""

    number: int
    """Number of the last version."""
    writes: tuple[Write, ...] = ()
    clamps: Mapping[str, WatchList] = {}
    """By digest: a watch list with clamps that the workers do not have yet."""


class WorkerUpdate(NamedTuple):
    """What the workers apply before one forward pass, and the requests that start in it."""

    after: int
    """Number of the swap that the workers must have carried out last."""
    dropped: tuple[str, ...] = ()
    """Digests of clamps that no request needs any more. Workers drop them before the swap, since
    the swap may bring some of them back."""
    swap: Swap | None = None
    admitted: Mapping[str, Admitted] = {}
    """By request id: the clamps of each request that starts in this pass."""


class UpdateQueue:
    """Keeps changes for the next step, which may come much later if there are no requests.

    The swaps of versions that arrive meanwhile are merged into one, no larger than the taps.
    """

    def __init__(self) -> None:
        """Start with the watch list that the workers were started with."""
        self.number = 0
        """Number of the last swap that was sent."""
        self._lock = threading.Lock()
        self._swap: Swap | None = None
        self._dropped: list[str] = []
        """Digests of clamps that the workers have and should drop."""

    def put(self, swap: Swap) -> None:
        """Queue a swap, before its version becomes the current one; any thread may call this."""
        with self._lock:
            if self._swap is not None:
                writes = merge_writes(self._swap.writes, swap.writes)
                swap = Swap(swap.number, writes, {**self._swap.clamps, **swap.clamps})
            self._swap = swap

    def drop(self, clamps: str) -> None:
        """Queue the removal of clamps; if they were never sent, do not send them."""
        with self._lock:
            if self._swap is None or clamps not in self._swap.clamps:
                self._dropped.append(clamps)
                return
            left = {d: over for d, over in self._swap.clamps.items() if d != clamps}
            self._swap = self._swap._replace(clamps=left)

    def take(self, admitted: Mapping[str, Admitted]) -> WorkerUpdate:
        """Return the update for the step that was just scheduled."""
        with self._lock:
            swap, self._swap = self._swap, None
            dropped, self._dropped = tuple(self._dropped), []
        update = WorkerUpdate(self.number, dropped, swap, admitted)
        if swap is not None:
            self.number = swap.number
        return update


def merge_writes(earlier: Sequence[Write], later: Sequence[Write]) -> tuple[Write, ...]:
    """Return writes with the effect of `earlier`, then `later`; no column gets two encoder rows."""
    lowered = [w for w in (*earlier, *later) if "screen" in w.rows]
    over = [w for w in later if "screen" not in w.rows]
    writes = [
        Write(layer, *_lowest([w for w in lowered if w.layer == layer]))
        for layer in sorted({w.layer for w in lowered})
    ]
    for write in earlier:
        if "screen" in write.rows:
            continue
        again = [w.columns for w in over if w.layer == write.layer]
        left = ~np.isin(write.columns, np.concatenate([*again, write.columns[:0]]))
        if left.any():
            rows = {name: values[left] for name, values in write.rows.items()}
            writes.append(Write(write.layer, write.columns[left], rows))
    return (*writes, *over)


def _lowest(writes: Sequence[Write]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Return the columns of one layer's writes, and the lowest screen threshold for each."""
    screens = np.concatenate([w.rows["screen"] for w in writes])
    columns, which = np.unique(np.concatenate([w.columns for w in writes]), return_inverse=True)
    lowest = np.full(len(columns), np.inf, screens.dtype)
    np.minimum.at(lowest, which, screens)
    return columns, {"screen": lowest}
