"""Records of the reloader: what it works on, its status, and the report of each reload."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeAlias

from saeguard.guard.prefix.store import PrefixStore
from saeguard.guard.watchlist import WatchList
from saeguard.policy.signing import Manifest
from saeguard.reload.columns import Columns
from saeguard.reload.compiler_process import Trigger
from saeguard.reload.policy_source import Source
from saeguard.reload.versions import Versions
from saeguard.reload.worker_updates import UpdateQueue

Outcome: TypeAlias = Literal["active", "unchanged", "refused", "failed"]


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
    error: str | None = None
    waiting: str | None = None
    """Digest of a watch list that waits for free columns."""
    asked: int = 0
    """Number of reloads that were requested by a signal and are finished."""
    outcomes: Counter[str] = field(default_factory=Counter)
