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

from saeguard.guard.columns import Write
from saeguard.guard.watchlist import WatchList


class Admitted(NamedTuple):
    """Which clamps may edit a request."""

    clamps: str
    """Digest of its list's clamps."""
    enforced: frozenset[tuple[str, str]]
    """Id and mode of each policy that is enforced for it."""
    roles: np.ndarray | None = None
    """[prompt tokens] whose turn each is in; None where no policy asks."""


class Swap(NamedTuple):
    """What a new list needs on the device."""

    number: int
    writes: tuple[Write, ...] = ()
    clamps: tuple[str, WatchList] | None = None
    """Digest, and the list that they are of; None where the workers have them."""


class Orders(NamedTuple):
    """What comes with one pass."""

    after: int
    """Number of the last swap that must have been carried out before."""
    swaps: tuple[Swap, ...] = ()
    dropped: tuple[str, ...] = ()
    """Digests of clamps that no request needs any more."""
    admitted: Mapping[str, Admitted] = {}
    """By request id, of those that start in this pass."""


class Outbox:
    """Orders that wait for the next pass."""

    def __init__(self) -> None:
        """Start with the list that the workers were started with."""
        self.number = 0
        """Of the last swap told."""
        self._lock = threading.Lock()
        self._swaps: list[Swap] = []
        self._dropped: list[str] = []

    def put(self, swap: Swap) -> None:
        """Tell of a swap; from any thread, before the list is made the present one."""
        with self._lock:
            self._swaps.append(swap)

    def drop(self, clamps: str) -> None:
        """Tell that clamps are not needed any more."""
        with self._lock:
            self._dropped.append(clamps)

    def take(self, admitted: Mapping[str, Admitted]) -> Orders:
        """Return what comes with the pass that was just laid out."""
        with self._lock:
            swaps, self._swaps = tuple(self._swaps), []
            dropped, self._dropped = tuple(self._dropped), []
        orders = Orders(self.number, swaps, dropped, admitted)
        if swaps:
            self.number = swaps[-1].number
        return orders
