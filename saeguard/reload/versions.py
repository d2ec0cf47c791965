"""The watch lists in use: the present one, and those that requests under way began with.

A request is judged to its end by the list that was present when it came. So a swap is one
assignment, nothing about a request changes in its middle, and each verdict is exactly the one that
its list reaches over the whole text. A list goes when the last of its requests has ended.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Container, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from weakref import WeakSet

import numpy as np

from saeguard.guard.forward_pass import ForwardPass
from saeguard.guard.ledger import Hit, Ledger
from saeguard.guard.prefix.store import PrefixStore, PrefixView
from saeguard.guard.request_verdicts import Verdicts
from saeguard.guard.state import State
from saeguard.guard.verdict import Coverage
from saeguard.guard.watchlist import WatchList, clamps_digest


class Pin:
    """Holds a list for a request that is on its way in; let go, it holds nothing."""

    __slots__ = ("__weakref__", "version")

    def __init__(self, version: Version) -> None:
        """Hold `version`."""
        self.version = version
        version.pins.add(self)


@dataclass(eq=False, slots=True, weakref_slot=True)
class Version:
    """One watch list, and the account of the requests that it judges."""

    number: int
    """Of the swap that brought it; 0 for the one the server was started with."""
    watchlist: WatchList
    """Over the taps' columns."""
    ledger: Ledger
    reads: Mapping[int, frozenset[int]]
    """By layer, the taps' columns that it reads."""
    clamps: str
    """Digest of what edits; empty where nothing can."""
    can_stop: bool = True
    """Whether a verdict may be needed in the step that makes it."""
    pins: WeakSet[Pin] = field(default_factory=WeakSet)
    decided: dict[Any, Any] = field(default_factory=dict)
    """What was settled for requests of one kind, by whoever settles it."""


def make_version(
    number: int,
    watchlist: WatchList,
    reads: Mapping[int, frozenset[int]],
    *,
    may_enforce: frozenset[str] = frozenset(),
    prefix_store: PrefixStore | None = None,
    needs: int = 0,
) -> Version:
    """Return a list with an empty account.

    Args:
        number: of the swap that brings it.
        watchlist: over the taps' columns.
        reads: by layer, the columns that it reads.
        may_enforce: ids of shadow policies that are enforced for some requests.
        prefix_store: of what was seen of cached tokens.
        needs: the swap since which passes hold all of these columns.
    """
    view = None if prefix_store is None else PrefixView(prefix_store, number, needs)
    ledger = Ledger(watchlist, prefix_store=view)
    can_stop = any(
        (p.action == "stop" or p.on_error == "stop")
        and (p.mode == "enforce" or p.id in may_enforce)
        for p in watchlist.policies
    )
    return Version(number, watchlist, ledger, reads, clamps_digest(watchlist), can_stop)


def _as_seen_by(version: Version, forward_pass: ForwardPass) -> ForwardPass:
    """Return a pass as a list's requests have it; taps that do not know its rows saw nothing."""
    ran = forward_pass.ran and forward_pass.swaps >= version.number
    acted = forward_pass.acted_by.get(version.clamps, forward_pass.acted)
    if ran == forward_pass.ran and acted is forward_pass.acted:
        return forward_pass
    return replace(forward_pass, ran=ran, acted=acted)


class Versions:
    """One ledger a list; requests are known by their id, whichever list they belong to."""

    def __init__(self, first: Version) -> None:
        """Start with one list."""
        self.current = first
        self.live: tuple[Version, ...] = (first,)
        """Oldest first; replaced, never changed, so that another thread may read it."""
        self._lock = threading.Lock()
        self._of: dict[str, Version] = {}
        self.unwatched_passes = 0

    def __contains__(self, request_id: str) -> bool:
        """Return whether the request is in flight."""
        return request_id in self._of

    def __len__(self) -> int:
        """Return the number of requests in flight."""
        return len(self._of)

    # --- lists come and go ----------------------------------------------------------------------

    def pin(self) -> Pin:
        """Hold the present list for a request that comes; from any thread."""
        with self._lock:
            return Pin(self.current)

    def publish(self, version: Version) -> None:
        """Make a list the present one; from any thread."""
        with self._lock:
            self.live = (*self.live, version)
            self.current = version

    def retire(self) -> tuple[Version, ...]:
        """Let go of lists that no request needs any more, and return them."""
        if len(self.live) == 1:
            return ()
        with self._lock:
            gone = tuple(
                g for g in self.live if g is not self.current and not g.pins and not len(g.ledger)
            )
            self.live = tuple(g for g in self.live if g not in gone)
        return gone

    def of(self, request_id: str) -> Version:
        """Return the list that judges a request."""
        return self._of[request_id]

    # --- what a ledger does, for the one that a request belongs to ------------------------------

    def admit(
        self,
        request_id: str,
        prompt_tokens: int,
        keys: Sequence[bytes],
        *,
        pin: Pin,
        enforced: Sequence[bool],
        roles: np.ndarray | None = None,
    ) -> None:
        """Start a request under the list that was pinned for it; see `Ledger.admit`."""
        version = self._of[request_id] = pin.version
        version.ledger.admit(request_id, prompt_tokens, keys=keys, enforced=enforced, roles=roles)

    def ingest(
        self, forward_pass: ForwardPass, valid: np.ndarray, entering: Container[str] | None = None
    ) -> list[Hit]:
        """Advance every request by the rows of one pass; see `Ledger.ingest`.

        Older lists go first: a newer request can read a prefix that an older one computes in this
        very pass.
        """
        self.unwatched_passes += not forward_pass.ran
        hits: list[Hit] = []
        owner = [self._of.get(request_id) for request_id in forward_pass.request_ids]
        for version in self.live:
            mine = np.where([g is version for g in owner], valid, 0)
            if mine.any():
                own = _as_seen_by(version, forward_pass)
                hits += version.ledger.ingest(own, mine, entering)
        return hits

    def ingest_all(
        self, passes: Sequence[tuple[ForwardPass, np.ndarray, Collection[str]]]
    ) -> list[Hit]:
        """Advance every request by several passes, in order; see `Ledger.ingest_all`."""
        hits: list[Hit] = []
        at = 0
        while at < len(passes):
            if len(self.live) > 1 and passes[at][2]:
                hits += self.ingest(*passes[at])
                at += 1
                continue
            # Nobody reads what another one computes in passes into which nobody comes: so each
            # list can take them in one go.
            end = at + 1
            while end < len(passes) and (len(self.live) == 1 or not passes[end][2]):
                end += 1
            self.unwatched_passes += sum(
                not forward_pass.ran for forward_pass, _, _ in passes[at:end]
            )
            for version in self.live:
                hits += version.ledger.ingest_all(self._mine(version, passes[at:end]))
            at = end
        return hits

    def _mine(
        self, version: Version, passes: Sequence[tuple[ForwardPass, np.ndarray, Container[str]]]
    ) -> list[tuple[ForwardPass, np.ndarray, Container[str]]]:
        """Return what passes hold of the requests of one list."""
        if len(self.live) == 1:
            return [(_as_seen_by(version, p), valid, entering) for p, valid, entering in passes]
        mine = []
        for forward_pass, valid, entering in passes:
            which = [
                i for i, r in enumerate(forward_pass.request_ids) if self._of.get(r) is version
            ]
            if which:
                part = _as_seen_by(version, forward_pass.of_requests(which))
                mine.append((part, valid[which], entering))
        return mine

    def finish(self, request_id: str, tokens: int, *, forget: bool = True) -> Verdicts:
        """Return one verdict per policy; see `Ledger.finish`."""
        version = self._of[request_id]
        verdicts = version.ledger.finish(request_id, tokens, forget=forget)
        if forget:
            del self._of[request_id]
        return verdicts

    def forget(self, request_id: str) -> None:
        """End a request."""
        self._of.pop(request_id).ledger.forget(request_id)

    def coverage(self, request_id: str, tokens: int) -> Coverage:
        """Return the request's own account; see `Ledger.coverage`."""
        return self._of[request_id].ledger.coverage(request_id, tokens)

    def seen(self, request_id: str) -> int:
        """Return the position up to which a request's tokens have been accounted for."""
        return self._of[request_id].ledger.seen(request_id)

    def enforces(self, request_id: str, policy: int) -> bool:
        """Return whether a policy's action is to be taken for a request."""
        return self._of[request_id].ledger.enforces(request_id, policy)

    def save(self, request_id: str) -> State:
        """Return a copy of all that is known of a request, for `restore`."""
        return self._of[request_id].ledger.save(request_id)

    def restore(self, request_id: str, saved: State) -> None:
        """Take back what was ingested of a request since `save`."""
        self._of[request_id].ledger.restore(request_id, saved)
