"""The versions of the watch list in use: the current one, and those of requests in flight.

A request is judged to its end by the version that was current when it arrived. So a swap is one
assignment, and each verdict is the verdict of one watch list over the whole text. A version is
retired when the last of its requests has ended.
"""

from __future__ import annotations

import threading
from collections.abc import Container, Mapping
from dataclasses import dataclass, field, replace
from typing import Any
from weakref import WeakSet

import numpy as np

from saeguard.guard.forward_pass import ForwardPass
from saeguard.guard.ledger import Hit, Ledger
from saeguard.guard.prefix.store import PrefixStore, PrefixView
from saeguard.guard.readings import Readings
from saeguard.guard.watchlist import WatchList, clamps_digest


class Pin:
    """Keeps a version live for an arriving request, until the pin is garbage-collected."""

    __slots__ = ("__weakref__", "version")

    def __init__(self, version: Version) -> None:
        """Pin `version`."""
        self.version = version
        version.pins.add(self)


@dataclass(eq=False, slots=True, weakref_slot=True)
class Version:
    """One watch list, and the ledger of the requests that it judges."""

    number: int
    """Number of the swap that brought it; 0 for the version that the server was started with."""
    watchlist: WatchList
    """The watch list in terms of the taps' columns."""
    ledger: Ledger
    reads: Mapping[int, frozenset[int]]
    """By layer: the taps' columns that it reads."""
    clamps: str
    """Digest of its clamps; empty without clamps."""
    can_stop: bool = True
    """Whether a policy may stop a request. Then every forward pass is judged in its own step."""
    pins: WeakSet[Pin] = field(default_factory=WeakSet)
    decided: dict[Any, Any] = field(default_factory=dict)
    """A cache for the caller: its decision for each kind of request."""


def make_version(
    number: int,
    watchlist: WatchList,
    reads: Mapping[int, frozenset[int]],
    *,
    may_enforce: frozenset[str] = frozenset(),
    prefix_store: PrefixStore | None = None,
    needs: int = 0,
    readings: Readings | None = None,
) -> Version:
    """Return a version without requests.

    Args:
        number: of the swap that brings it.
        watchlist: over the taps' columns.
        reads: by layer, the columns that it reads.
        may_enforce: ids of shadow policies that are enforced for some requests.
        prefix_store: fired latents of cached tokens; None without a prefix cache.
        needs: number of the swap from which on forward passes hold all of these columns.
        readings: collects the feature values of whole texts; None while serving.
    """
    view = None if prefix_store is None else PrefixView(prefix_store, number, needs)
    ledger = Ledger(watchlist, prefix_store=view)
    ledger.readings = readings
    can_stop = any(
        (p.action == "stop" or p.on_error == "stop")
        and (p.mode == "enforce" or p.id in may_enforce)
        for p in watchlist.policies
    )
    return Version(number, watchlist, ledger, reads, clamps_digest(watchlist), can_stop)


def _as_read_by(version: Version, forward_pass: ForwardPass) -> ForwardPass:
    """Return a forward pass as a version reads it: not `ran` if its encoder rows were missing."""
    ran = forward_pass.ran and forward_pass.swaps >= version.number
    acted = forward_pass.acted_by.get(version.clamps, forward_pass.acted)
    if ran == forward_pass.ran and acted is forward_pass.acted:
        return forward_pass
    return replace(forward_pass, ran=ran, acted=acted)


class Versions:
    """The live versions; `versions[request_id]` is the one that judges a request."""

    def __init__(self, first: Version) -> None:
        """Start with one version."""
        self.current = first
        self.live: tuple[Version, ...] = (first,)
        """Oldest first; replaced, never changed, so that other threads may read it."""
        self._lock = threading.Lock()
        self.unwatched_passes = 0

    def __getitem__(self, request_id: str) -> Version:
        """Return the version that judges a request in flight."""
        for version in self.live:
            if request_id in version.ledger:
                return version
        raise KeyError(request_id)

    def pin(self) -> Pin:
        """Pin the current version for an arriving request; any thread may call this."""
        with self._lock:
            return Pin(self.current)

    def publish(self, version: Version) -> None:
        """Make a version the current one; any thread may call this."""
        with self._lock:
            self.live = (*self.live, version)
            self.current = version

    def retire(self) -> tuple[Version, ...]:
        """Remove the versions that no request needs any more, and return them."""
        if len(self.live) == 1:
            return ()
        with self._lock:
            gone = tuple(
                v for v in self.live if v is not self.current and not v.pins and not len(v.ledger)
            )
            self.live = tuple(v for v in self.live if v not in gone)
        return gone

    def ingest(
        self, forward_pass: ForwardPass, valid: np.ndarray, entering: Container[str] | None = None
    ) -> list[Hit]:
        """Advance every request by the rows of one forward pass; see `Ledger.ingest`.

        Older versions go first: a newer request can read a prefix that an older request computes in
        this pass.
        """
        self.unwatched_passes += not forward_pass.ran
        if len(self.live) == 1:
            only = self.live[0]
            return only.ledger.ingest(_as_read_by(only, forward_pass), valid, entering)
        hits: list[Hit] = []
        for version in self.live:
            mine = np.where([r in version.ledger for r in forward_pass.request_ids], valid, 0)
            if mine.any():
                hits += version.ledger.ingest(_as_read_by(version, forward_pass), mine, entering)
        return hits
