"""Swap the watch list while requests are in flight.

A thread of the engine core receives compiled watch lists from the compiler process, assigns columns
to new rows, queues an update for the workers, and makes the new version current. A refused watch
list changes nothing.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime

import numpy as np
import structlog

from saeguard.errors import InputError
from saeguard.guard.install_taps import Write
from saeguard.guard.watchlist import WatchList
from saeguard.policy.signing import Manifest
from saeguard.reload import state_dir
from saeguard.reload.columns import (
    assign_columns,
    check_fits,
    oldest_readable,
    over_tap_columns,
    used,
)
from saeguard.reload.compiler_process import Compiler, CompilerReading, Trigger
from saeguard.reload.difference import Difference, difference
from saeguard.reload.file_watcher import Look
from saeguard.reload.reload_state import (
    Outcome,
    ReloadContext,
    ReloadStatus,
    Report,
    note_look,
    status_record,
)
from saeguard.reload.versions import make_version
from saeguard.reload.worker_updates import Swap

log = structlog.get_logger("saeguard")

TICK_S = 0.1
"""Seconds between searches for versions that no request needs."""
RESTART_S = 1.0


class RefusedError(InputError):
    """A compiled watch list that this server cannot serve."""


class Reloader:
    """Keeps the current version up to date with the policy files."""

    def __init__(self, where: ReloadContext, manifest: Manifest | None) -> None:
        """Start the thread that watches the files.

        Args:
            where: the parts of the engine core that reloads change.
            manifest: of the current version; None if bundles need no signature.
        """
        self.status = ReloadStatus()
        self._where = where
        self._manifest = manifest
        self._first_clamps = where.versions.current.clamps
        self._last: CompilerReading | None = None
        self._asked: list[Trigger] = []
        self._superseded = 0  # readings on request that a later one replaces, and answers
        self._closed = False
        self._keep(manifest)
        self._write_status()
        self._thread = threading.Thread(target=self._run, name="saeguard-reload", daemon=True)
        self._thread.start()

    def ask(self, trigger: Trigger) -> None:
        """Request a reading of the files; any thread or signal handler may call this."""
        self._asked.append(trigger)

    def close(self) -> None:
        """Stop the thread."""
        self._closed = True
        self._thread.join(5)

    # --- the thread -----------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._closed:
            compiler = Compiler(self._where.source, self._looked)
            try:
                self._follow(compiler)
            except (EOFError, OSError):
                if not self._closed:
                    self._failed("the process that reads policies has ended; starting another")
                    time.sleep(RESTART_S)
            except Exception as error:
                self._failed(f"{type(error).__name__}: {error}")
                log.exception("saeguard reload failed")
                time.sleep(RESTART_S)
            finally:
                compiler.close()

    def _follow(self, compiler: Compiler) -> None:
        # The files may have changed since the server read them, or while no process watched them.
        self._take(compiler, compiler.read("files"))
        while not self._closed:
            self._retire()
            if self._asked:
                self._take(compiler, compiler.read(self._asked.pop(0)))
            elif compiler.changed(TICK_S):
                self._take(compiler, compiler.read("files"))

    def _take(self, compiler: Compiler, reading: CompilerReading) -> None:
        """Make a reading's watch list the current version if possible, and report the outcome."""
        where, old = self._where, self._where.versions.current.watchlist.digest
        began = time.perf_counter()
        before, rows = where.versions.current.watchlist, 0
        if reading.error is None and reading.watchlist is None and self._last is not None:
            same = self._last
            reading = replace(reading, watchlist=same.watchlist, ids=same.ids, digest=same.digest)
        if reading.watchlist is not None:
            self._last = reading
        new = reading.digest or None
        outcome: Outcome = "refused"
        error = reading.error
        if error is None:
            try:
                where.check_manifest(reading.manifest)
                if new == old:
                    outcome = "unchanged"
                else:
                    written = self._swap(compiler, reading)
                    if written is None:
                        self._superseded += reading.trigger != "files"
                        return  # a later reading arrived while this one waited
                    rows, outcome = written, "active"
                    for doubt in reading.doubts:  # as at start
                        log.warning("a policy rests on weak evidence", finding=doubt)
                self._manifest = reading.manifest
                self._keep(reading.manifest)
            except (ValueError, RuntimeError) as refused:
                error = str(refused)
        self._report(
            Report(
                outcome=outcome if error is None else "refused",
                trigger=reading.trigger,
                old=old,
                new=new,
                error=error,
                policies=len(where.versions.current.watchlist.policies),
                revision=None if self._manifest is None else self._manifest.revision,
                read_ms=round(1e3 * reading.seconds, 1),
                swap_ms=round(1e3 * (time.perf_counter() - began), 1),
                encoder_rows=rows,
                difference=difference(before, where.versions.current.watchlist),
            )
        )

    def _swap(self, compiler: Compiler, reading: CompilerReading) -> int | None:
        """Swap in a watch list; return the encoder rows written, None if a later reading is first.

        Raises:
            ValueError: this server cannot serve the watch list.
        """
        where, watchlist = self._where, reading.watchlist
        assert watchlist is not None
        present = where.versions.current
        if watchlist.exclude_tokens != present.watchlist.exclude_tokens:
            raise RefusedError(
                f"the feature sets exclude tokens {list(watchlist.exclude_tokens)}, this server "
                f"excludes {list(present.watchlist.exclude_tokens)}: start it again"
            )
        where.accept(watchlist)
        check_fits(where.columns, watchlist.hooks, reading.ids, present.reads)
        number = present.number + 1
        while True:
            self._retire()
            placed = assign_columns(
                where.columns, watchlist.hooks, reading.ids, self._in_use(), number
            )
            if placed is not None:
                break
            # It fits beside the current version, but not beside older ones with requests.
            self.status.waiting = watchlist.digest
            self._write_status()
            if self._closed or self._asked or compiler.changed(TICK_S):
                self.status.waiting = None
                return None
        self.status.waiting = None
        writes = self._writes(compiler, watchlist, placed.at, placed.missing)
        reads = used(watchlist.hooks, placed.at)
        whole = over_tap_columns(watchlist, placed.columns, placed.at, present.watchlist.hooks)
        needs = oldest_readable(placed.columns, reads)
        source = where.source
        ids = {p.id for p in watchlist.policies}
        version = make_version(
            number,
            whole,
            reads,
            may_enforce=source.may_enforce | source.access.ever_enforced(ids),
            prefix_store=where.prefix_store,
            needs=needs,
        )
        clamps = {}
        if version.clamps and version.clamps not in {v.clamps for v in where.versions.live}:
            if where.graphs_hold_clamps and version.clamps != self._first_clamps:
                raise RefusedError(
                    "clamps differ from those that this server was started with, which its CUDA "
                    "graphs hold: start it again, or serve with --enforce-eager to change clamps "
                    "while serving"
                )
            if not where.graphs_hold_clamps:
                clamps = {version.clamps: whole}
        where.columns = placed.columns
        where.updates.put(Swap(number, writes, clamps))
        where.versions.publish(version)
        return sum(len(write.columns) for write in writes if "W" in write.rows)

    def _writes(
        self,
        compiler: Compiler,
        watchlist: WatchList,
        at: Sequence[np.ndarray],
        missing: Sequence[np.ndarray],
    ) -> tuple[Write, ...]:
        screens = tuple(
            Write(hook.layer, where[part.columns], {"screen": part.screen.numpy()})
            for hook, where in zip(watchlist.hooks, at, strict=True)
            for part in hook.ranked
        )
        if not any(map(len, missing)):
            return screens
        rows = compiler.rows(missing)
        return screens + tuple(
            Write(hook.layer, where[which], values)
            for hook, where, which, values in zip(watchlist.hooks, at, missing, rows, strict=True)
            if len(which)
        )

    def _in_use(self) -> dict[int, frozenset[int]]:
        """Return the columns that live versions read, by layer."""
        held: dict[int, frozenset[int]] = {}
        for version in self._where.versions.live:
            for layer, columns in version.reads.items():
                held[layer] = held.get(layer, frozenset()) | columns
        return held

    def _retire(self) -> None:
        """Remove versions that no request needs, and have the workers drop their clamps."""
        gone = self._where.versions.retire()
        left = {v.clamps for v in self._where.versions.live}
        for clamps in {v.clamps for v in gone} - left - {""}:
            if not self._where.graphs_hold_clamps:
                self._where.updates.drop(clamps)

    # --- reports --------------------------------------------------------------------------------

    def _failed(self, error: str) -> None:
        present = self._where.versions.current.watchlist
        revision = None if self._manifest is None else self._manifest.revision
        policies, digest, none = len(present.policies), present.digest, Difference()
        self._report(
            Report("failed", "files", digest, None, error, policies, revision, 0.0, 0.0, 0, none)
        )

    def _looked(self, look: Look) -> None:
        if note_look(self.status, look):
            self._write_status()

    def _report(self, report: Report) -> None:
        status = self.status
        status.current = report.error is None
        status.error, status.last = report.error, report.outcome
        status.asked += (report.trigger != "files") + self._superseded
        self._superseded = 0
        status.outcomes[report.outcome] += 1
        if report.outcome == "active":
            now = datetime.now(UTC).isoformat(timespec="seconds")
            status.last_change = {"time": now, **asdict(report.difference)}
        first = report.outcome == "unchanged" and status.outcomes.total() == 1
        if not first:  # the reading at the start, which found the current version
            self._where.report(report)
        self._write_status()

    def _keep(self, manifest: Manifest | None) -> None:
        if manifest is not None and self._where.state is not None:
            state_dir.keep_revision(self._where.state, manifest.revision, manifest.digest)

    def _write_status(self) -> None:
        if self._where.state is None:
            return
        revision = None if self._manifest is None else self._manifest.revision
        content = status_record(self.status, self._where.versions.current, revision)
        try:
            state_dir.write_status(self._where.state, self._where.engine, content)
        except OSError as error:
            log.warning("saeguard status cannot be written", error=str(error))
