"""Records of the reloader: what it works on, its status, and the report of each reload."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import structlog

from saeguard.guard.prefix.store import PrefixStore
from saeguard.guard.watchlist import WatchList
from saeguard.policy.signing import Manifest
from saeguard.reload.columns import Columns
from saeguard.reload.compiler_process import Trigger
from saeguard.reload.difference import Difference
from saeguard.reload.file_watcher import LOOK_S, Look
from saeguard.reload.policy_source import Source
from saeguard.reload.state_dir import started_at
from saeguard.reload.versions import Version, Versions
from saeguard.reload.worker_updates import UpdateQueue

log = structlog.get_logger("saeguard")

Outcome: TypeAlias = Literal["active", "unchanged", "refused", "failed"]
OUTCOMES: tuple[Outcome, ...] = get_args(Outcome)

STALE_S = 60.0
"""Seconds without a comparison after which nothing is known of the files, such as on a network file
system that hangs."""


@dataclass(frozen=True, slots=True)
class Report:
    """The result of one reload."""

    outcome: Outcome
    trigger: Trigger
    old: str
    """Digest of the watch list that was current before."""
    new: str | None
    """Digest of the new watch list; None if it could not be read."""
    error: str | None
    policies: int
    """Number of policies of the watch list that is current now."""
    revision: int | None
    """Signed revision that is current now; None without signatures."""
    read_ms: float
    """Milliseconds of reading and compiling, in the compiler process."""
    swap_ms: float
    """Milliseconds from then until the new version was current; steps go on meanwhile."""
    encoder_rows: int
    """Number of encoder rows written into the taps."""
    difference: Difference
    """What the new watch list has in place of the old one; empty unless it is in use now."""


@dataclass(slots=True)
class ReloadContext:
    """What a reload changes in the engine core, and the checks that only the core can make."""

    source: Source
    versions: Versions
    columns: tuple[Columns, ...]
    updates: UpdateQueue
    report: Callable[[Report], None]
    accept: Callable[[WatchList], None]
    """Raises ValueError if the watch list does not fit the model."""
    check_manifest: Callable[[Manifest | None], None]
    prefix_store: PrefixStore | None = None
    graphs_hold_clamps: bool = False
    """Whether captured CUDA graphs replay the clamps that the server was started with."""
    state: Path | None = None
    engine: int = 0


@dataclass(slots=True)
class ReloadStatus:
    """The state of reloading, for other threads to read."""

    current: bool = True
    """Whether the current version is compiled from the files as they were last read."""
    compared: float = field(default_factory=time.monotonic)
    """When the files were last compared with what was read, by the monotonic clock."""
    compared_only: str | None = None
    """Why the system does not report changes of the files; None if it does."""
    error: str | None = None
    waiting: str | None = None
    """Digest of a watch list that waits for free columns."""
    asked: int = 0
    """Number of reloads that were requested by a signal and are finished."""
    outcomes: Counter[str] = field(default_factory=Counter)
    last: Outcome | None = None
    """Outcome of the last reload."""
    last_change: Mapping[str, Any] | None = None
    """Time, and difference, of the last swap."""

    @property
    def in_use(self) -> bool:
        """Return whether the policies of the files are in use, as far as is known now."""
        return self.current and time.monotonic() - self.compared < STALE_S


def note_look(status: ReloadStatus, look: Look) -> bool:
    """Note that the files were compared; log, and return True, if they are found otherwise now."""
    status.compared = time.monotonic()
    if look.compared_only == status.compared_only:
        return False
    status.compared_only = look.compared_only
    if look.compared_only is None:
        log.info("saeguard: the system reports changes of the policy files again")
    else:
        log.warning(
            "saeguard: the system does not report changes of the policy files, which are compared "
            "instead; is fs.inotify.max_user_instances used up?",
            reason=look.compared_only,
            every_s=LOOK_S,
        )
    return True


def status_record(status: ReloadStatus, present: Version, revision: int | None) -> dict[str, Any]:
    """Return what an engine core keeps in the state folder for `saeguard reload`."""
    return {
        "pid": os.getpid(),
        "started_at": started_at(os.getpid()),
        "time": datetime.now(UTC).isoformat(),
        "watchlist": present.watchlist.digest,
        "swap": present.number,
        "policies": len(present.watchlist.policies),
        "revision": revision,
        "current": status.current,
        "error": status.error,
        "waiting": status.waiting,
        "compared_only": status.compared_only,
        "asked": status.asked,
        "last": status.last,
        "last_change": status.last_change,
    }
