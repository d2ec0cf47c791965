"""What the engine core tells the workers about watch lists, with the pass that it holds for.

Orders ride with vLLM's own `SchedulerOutput`, which reaches every rank once, in the order of
passes. So all ranks write the same columns before the same pass, without a message of the guard's
own, a round trip or a lock.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from saeguard.guard.install_taps import Write
from saeguard.guard.watchlist import WatchList
from saeguard.reload.columns import merge_writes


class Admitted(NamedTuple):
    """Which clamps may edit a request."""

    clamps: str
    """Digest of its list's clamps."""
    enforced: frozenset[tuple[str, str]]
    """Id and mode of each policy that is enforced for it."""
    roles: np.ndarray | None = None
    """[prompt tokens] whose turn each is in; None where no policy asks."""


class Swap(NamedTuple):
    """What new lists need on the device."""

    number: int
    """Of the last of them."""
    writes: tuple[Write, ...] = ()
    clamps: Mapping[str, WatchList] = {}
    """By digest, those that the workers do not have: a list that they are of."""


class WorkerUpdate(NamedTuple):
    """What comes with one pass."""

    after: int
    """Number of the last swap that must have been carried out before."""
    dropped: tuple[str, ...] = ()
    """Digests of clamps that no request needs any more; to go before the swap, which may bring
    some of them back."""
    swap: Swap | None = None
    admitted: Mapping[str, Admitted] = {}
    """By request id, of those that start in this pass."""


class UpdateQueue:
    """Orders that wait for the next pass; without requests it may be long in coming.

    So lists that come meanwhile are one swap, which is no larger than what the taps hold.
    """

    def __init__(self) -> None:
        """Start with the list that the workers were started with."""
        self.number = 0
        """Of the last swap told."""
        self._lock = threading.Lock()
        self._swap: Swap | None = None
        self._dropped: list[str] = []
        """Clamps that the workers have."""

    def put(self, swap: Swap) -> None:
        """Tell of a swap; from any thread, before the list is made the present one."""
        with self._lock:
            if self._swap is not None:
                writes = merge_writes(self._swap.writes, swap.writes)
                swap = Swap(swap.number, writes, {**self._swap.clamps, **swap.clamps})
            self._swap = swap

    def drop(self, clamps: str) -> None:
        """Tell that clamps are not needed any more, unless the workers never heard of them."""
        with self._lock:
            if self._swap is None or clamps not in self._swap.clamps:
                self._dropped.append(clamps)
                return
            left = {d: over for d, over in self._swap.clamps.items() if d != clamps}
            self._swap = self._swap._replace(clamps=left)

    def take(self, admitted: Mapping[str, Admitted]) -> WorkerUpdate:
        """Return what comes with the pass that was just laid out."""
        with self._lock:
            swap, self._swap = self._swap, None
            dropped, self._dropped = tuple(self._dropped), []
        update = WorkerUpdate(self.number, dropped, swap, admitted)
        if swap is not None:
            self.number = swap.number
        return update
