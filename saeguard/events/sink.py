"""A bounded queue and one writer thread: events reach the disk, and never hold up serving."""

from __future__ import annotations

import atexit
import contextlib
import errno
import io
import json
import queue
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import structlog

_END = object()


class _Lines(io.FileIO):
    """A file that several engine cores append to: a line is one write, and lines do not mix."""

    def write(self, line: Any, /) -> int:
        """Append a whole line.

        Raises:
            OSError: it did not go in as a whole, so the disk is full.
        """
        written = super().write(line)
        if written != len(line):
            raise OSError(errno.ENOSPC, "an event was cut off")
        return written


def _as_bytes(_logger: Any, _method: str, event: Any) -> bytes:
    return json.dumps(event).encode()


class Sink:
    """Append events to a JSON-lines file; `produced == written + dropped` once closed."""

    def __init__(self, path: Path, *, capacity: int = 65536) -> None:
        """Open `path` for appending and start the writer.

        Engine cores of a data-parallel server share the file. The system appends each write as a
        whole on a local disk; a network file system may not.

        Raises:
            OSError: the file cannot be opened; better now than at the first event.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = _Lines(path, "a")
        # wrap_logger, not configure(): structlog's settings belong to the host process.
        self._log = structlog.wrap_logger(
            structlog.BytesLogger(self._file),
            processors=[
                structlog.processors.TimeStamper(fmt="iso", utc=True, key="time"),
                _as_bytes,
            ],
            wrapper_class=structlog.BoundLogger,
        )
        self._queue: queue.Queue[Any] = queue.Queue(capacity)
        self.produced = 0
        self.written = 0
        self.dropped = 0
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="saeguard-events", daemon=True)
        self._thread.start()
        atexit.register(self.close)

    def put(self, build: Callable[[], Mapping[str, Any]]) -> None:
        """Queue one event; `build` makes it on the writer's thread. Never blocks or raises."""
        self.produced += 1
        if self._closed:
            self.dropped += 1
            return
        try:
            self._queue.put_nowait(build)
        except queue.Full:
            self.dropped += 1

    def close(self, timeout_s: float = 10.0) -> None:
        """Write what is queued, for at most `timeout_s`, and close the file."""
        if self._closed:
            return
        self._closed = True
        with contextlib.suppress(queue.Full):
            self._queue.put(_END, timeout=timeout_s)
        self._thread.join(timeout_s)
        self.dropped = self.produced - self.written
        if not self._thread.is_alive():
            with contextlib.suppress(OSError):  # what a full disk did not take is counted above
                self._file.close()

    def _run(self) -> None:
        while (build := self._queue.get()) is not _END:
            try:
                self._log.msg(**build())
                self.written += 1
            except Exception:  # noqa: BLE001 - disk full, closed pipe: counted, serving goes on
                self.dropped += 1
