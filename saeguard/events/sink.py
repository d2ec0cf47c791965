"""Write events through a bounded queue and one thread, so that serving never waits."""

from __future__ import annotations

import atexit
import contextlib
import json
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, cast

import structlog

from saeguard.events.log_file import LogFile

log = structlog.get_logger("saeguard")

_END = object()
BREATH, PAUSE_S = 16, 0.001
"""The writer sleeps `PAUSE_S` after every `BREATH` events while the queue has room: it shares
Python's lock with the engine's steps, and a request leaves one event for each policy."""


def _as_bytes(_logger: Any, _method: str, event: Any) -> bytes:
    return json.dumps(event, separators=(",", ":")).encode()


class Sink:
    """Append events to a JSON-lines file; `produced == written + dropped` once closed."""

    def __init__(self, path: Path, *, capacity: int = 65536) -> None:
        """Open `path` for appending and start the writer.

        The engine cores of a data-parallel server share the file. A local disk appends each write
        as a whole; a network file system may not.

        Raises:
            OSError: the file cannot be opened.
        """
        self._file = LogFile(path)
        # wrap_logger, not configure(): structlog's settings belong to the host process.
        self._log = structlog.wrap_logger(
            structlog.BytesLogger(cast("BinaryIO", self._file)),
            processors=[
                # Whole seconds, since jq's fromdateiso8601 takes no others.
                structlog.processors.TimeStamper(fmt="%Y-%m-%dT%H:%M:%SZ", utc=True, key="time"),
                _as_bytes,
            ],
            wrapper_class=structlog.BoundLogger,
        )
        self._capacity = capacity
        self._queue: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.produced = 0
        self.written = 0
        self.dropped = 0
        self._queued = self._begun = 0
        """Events accepted, and events that the writer has begun with; the difference waits."""
        self._lock = threading.Lock()
        """Protects the counters; held only while adding to them."""
        self._closed = False
        self._failing = False
        self._thread = threading.Thread(target=self._run, name="saeguard-events", daemon=True)
        self._thread.start()
        atexit.register(self.close)

    def put(self, build: Callable[[], Mapping[str, Any]]) -> None:
        """Queue one event; `build` makes it on the writer's thread. Never blocks or raises."""
        self.put_all(lambda: (build() for _ in range(1)), 1)

    def put_all(self, build: Callable[[], Iterable[Mapping[str, Any]]], n: int) -> None:
        """Queue `n` events, which `build` makes on the writer's thread. Never blocks or raises.

        If the queue has room for fewer, the last are dropped.
        """
        with self._lock:
            room = 0 if self._closed else self._capacity - (self._queued - self._begun)
            taken = max(0, min(n, room))
            self.produced += n
            self.dropped += n - taken
            self._queued += taken
        if taken:
            self._queue.put((build, taken))

    def close(self, timeout_s: float = 10.0) -> None:
        """Write the queued events, for at most `timeout_s` seconds, and close the file."""
        if self._closed:
            return
        self._closed = True
        self._queue.put(_END)
        self._thread.join(timeout_s)
        self.dropped = self.produced - self.written
        if not self._thread.is_alive():
            with contextlib.suppress(OSError):  # events lost to a full disk are counted above
                self._file.close()

    def _run(self) -> None:
        while (queued := self._queue.get()) is not _END:
            build, n = queued
            try:
                events = iter(build())
            except Exception:  # noqa: BLE001 - counted below, serving goes on
                events = iter(())
            for at in range(n):
                self._write(events)
                if at % BREATH == BREATH - 1 and not self._hurried():
                    time.sleep(PAUSE_S)

    def _hurried(self) -> bool:
        """Return whether the queue fills up, so that the writer must not sleep."""
        return self._closed or self._queued - self._begun > self._capacity // 4

    def _write(self, events: Iterator[Mapping[str, Any]]) -> None:
        self._begun += 1  # written by this thread only
        written, failure = False, None
        try:
            event = next(events, None)
            if event is not None:
                self._log.msg(**event)
                written = True
        except Exception as error:  # noqa: BLE001 - disk full, closed pipe: counted, serving goes on
            failure = f"{type(error).__name__}: {error}"
        if failure is not None and not self._failing:
            log.error("saeguard: events are lost", file=str(self._file.path), error=failure)
        elif written and self._failing:
            log.info("saeguard: events are written again", file=str(self._file.path))
        self._failing = failure is not None or (self._failing and not written)
        with self._lock:
            self.written += written
            self.dropped += not written
