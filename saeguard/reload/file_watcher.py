"""Watch files for changes: edits, replacements, and symbolic links that point elsewhere.

`watchfiles`, which vLLM depends on, reports changes. It misses some on network file systems, and it
fails if the system has no inotify instance left. So sizes and times of all files are compared every
`LOOK_S` seconds, and their content every `CONTENT_S`, whether it works or not.
"""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Generator, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from saeguard.file_marks import marks
from saeguard.real_path import real_path
from saeguard.yaml_files.raw import read_bytes
from saeguard.yaml_files.reader import FileKind

SETTLE_MS = 30
"""Milliseconds; changes within this time count as one."""
LOOK_S = 2.0
"""Seconds between comparisons of sizes and times."""
CONTENT_S = 30.0
"""Seconds between comparisons of contents. They find what changes neither size nor time, on file
systems that keep no time of change or after a clock was set back."""
RETRY_S = 60.0
"""Seconds after which notifications are tried again."""
ANY = FileKind("policy file", max_bytes=8 << 20)
"""No file that is read is larger."""


class Look(NamedTuple):
    """The result of one comparison of the files."""

    changed: bool
    compared_only: str | None
    """Why the system does not report changes, so that they are only found by comparing; None if it
    does."""


def looks(roots: Iterable[Path], stop: threading.Event) -> Iterator[Look]:
    """Return an iterator over comparisons of the files with what they are now, until `stop` is set.

    It yields at each reported change, and at least every `LOOK_S` seconds.
    """
    roots = tuple(roots)
    return _looks(roots, stop, fingerprint(roots), contents(roots))


def _looks(
    roots: tuple[Path, ...], stop: threading.Event, seen: tuple[Any, ...] | None, held: bytes
) -> Iterator[Look]:
    due = time.monotonic() + CONTENT_S
    for compared_only in _notifications(roots, stop):
        now = fingerprint(roots)
        if now != seen:
            yield Look(changed=True, compared_only=compared_only)
            seen, held = now, contents(roots)
        elif time.monotonic() >= due:
            before, held = held, contents(roots)
            yield Look(held != before, compared_only)
            due = time.monotonic() + CONTENT_S
        else:
            yield Look(changed=False, compared_only=compared_only)


def _notifications(roots: tuple[Path, ...], stop: threading.Event) -> Iterator[str | None]:
    """Yield at each reported change and every `LOOK_S` seconds: why none is reported, or None."""
    while not stop.is_set():
        identity = _identity(roots)
        if None in identity:  # a root is missing; its successor needs a new watch
            stop.wait(LOOK_S / 4)
            yield None
            continue
        events = _watch(roots, stop)
        failure = _next(events)
        if failure is None:
            while not stop.is_set() and failure is None and _identity(roots) == identity:
                yield None
                failure = _next(events)
            events.close()
        retry = time.monotonic() + RETRY_S
        while failure is not None and not stop.is_set() and time.monotonic() < retry:
            yield failure
            stop.wait(LOOK_S)


def _watch(roots: tuple[Path, ...], stop: threading.Event) -> Generator[Any, None, None]:
    from watchfiles import watch  # noqa: PLC0415 - vLLM depends on it; only serving needs it

    yield from watch(
        *roots,
        watch_filter=None,  # Kubernetes' links begin with two dots
        debounce=200,
        step=SETTLE_MS,
        stop_event=stop,
        rust_timeout=int(1000 * LOOK_S),
        yield_on_timeout=True,
        ignore_permission_denied=True,
    )


def _next(events: Iterator[Any]) -> str | None:
    """Wait for the next notification; return why there can be none, None if there was one."""
    try:
        next(events, None)
    except FileNotFoundError:  # removed meanwhile
        return None
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # noqa: BLE001 - a panic of its Rust code is no Exception
        return f"{type(error).__name__}: {error}"
    return None


def _identity(roots: Iterable[Path]) -> tuple[Any, ...]:
    """Return values that change if a root is replaced by another folder."""
    found: list[Any] = []
    for root in roots:
        try:
            status = root.stat()
            found.append((status.st_dev, status.st_ino, real_path(root)))
        except OSError:
            found.append(None)
    return tuple(found)


def fingerprint(roots: Iterable[Path]) -> tuple[Any, ...] | None:
    """Return values that change if a YAML or JSON file does; None if a root is missing."""
    found: list[Any] = []
    for root in roots:
        try:
            status = root.stat()
        except OSError:
            return None
        if root.is_file():
            found.append((str(root), *marks(status)))
        else:
            found += _below(str(root))
    return tuple(sorted(found))


def contents(roots: Iterable[Path]) -> bytes:
    """Return a digest of the names and contents of all YAML and JSON files."""
    digest = hashlib.sha256()
    for path, *_ in fingerprint(roots) or ():
        content = read_bytes(Path(path), ANY)
        if isinstance(content, bytes):
            digest.update(hashlib.sha256(os.fsencode(path)).digest())
            digest.update(hashlib.sha256(content).digest())
    return digest.digest()


def _below(root: str) -> Iterator[tuple[Any, ...]]:
    """Yield the path and the marks of each file below a folder, however deep."""
    waiting: list[tuple[str, frozenset[tuple[int, int]]]] = [(root, frozenset())]
    while waiting:
        folder, above = waiting.pop()
        try:
            status = os.stat(folder)  # noqa: PTH116 - thousands of files; a Path costs more than its stat
            here = (status.st_dev, status.st_ino)
            entries = [] if here in above else list(os.scandir(folder))
        except OSError:
            continue
        for entry in entries:
            if entry.name.startswith("."):
                continue
            try:
                if entry.is_dir():
                    waiting.append((entry.path, above | {here}))
                elif entry.name.endswith((".yaml", ".yml", ".json")):
                    yield (entry.path, *marks(entry.stat()))
            except OSError:  # removed meanwhile, or a dangling link
                yield entry.path, 0, 0, 0, 0
