"""Watch files for changes: edits, replacements, and symbolic links that point elsewhere.

`watchfiles`, which vLLM depends on, reports changes. It misses some, on network file systems or if
a whole folder was replaced. So sizes and dates of all files are compared every `LOOK_S` seconds.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

SETTLE_MS = 30
"""Milliseconds; changes within this time count as one."""
LOOK_S = 2.0
"""Seconds between comparisons of all files."""


def changes(roots: Iterable[Path], stop: threading.Event) -> Iterator[None]:
    """Yield after each change below `roots`, until `stop` is set."""
    roots = tuple(roots)
    seen = fingerprint(roots)
    while not stop.is_set():
        for _ in _events(roots, stop):
            now = fingerprint(roots)
            if now != seen:
                seen = now
                yield
            if now is None:  # a root is missing; its successor needs a new watch
                break


def _events(roots: tuple[Path, ...], stop: threading.Event) -> Iterator[None]:
    """Yield at each reported change and every `LOOK_S` seconds, until a root is another folder."""
    from watchfiles import watch  # noqa: PLC0415 - vLLM depends on it; only serving needs it

    identity = _identity(roots)
    if None in identity:
        stop.wait(LOOK_S / 4)
        yield
        return
    try:
        events = watch(
            *roots,
            watch_filter=None,  # Kubernetes' links begin with two dots
            debounce=200,
            step=SETTLE_MS,
            stop_event=stop,
            rust_timeout=int(1000 * LOOK_S),
            yield_on_timeout=True,
            ignore_permission_denied=True,
        )
        for _ in events:
            yield
            if _identity(roots) != identity:
                return
    except (FileNotFoundError, OSError):  # removed meanwhile, or watching is not possible
        stop.wait(LOOK_S / 4)
        yield


def _identity(roots: Iterable[Path]) -> tuple[Any, ...]:
    """Return values that change if a root is replaced by another folder."""
    found: list[Any] = []
    for root in roots:
        try:
            status = root.stat()
        except OSError:
            found.append(None)
        else:
            found.append((status.st_dev, status.st_ino, os.path.realpath(root)))
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
            found.append(_mark(str(root), status))
        else:
            found += _below(str(root), frozenset())
    return tuple(sorted(found))


def _mark(path: str, status: os.stat_result) -> tuple[str, int, int, int]:
    return path, status.st_ino, status.st_size, status.st_mtime_ns


def _below(folder: str, above: frozenset[tuple[int, int]]) -> Iterator[tuple[str, int, int, int]]:
    try:
        status = os.stat(folder)  # noqa: PTH116 - thousands of files; a Path costs more than its stat
        here = (status.st_dev, status.st_ino)
        entries = [] if here in above else list(os.scandir(folder))
    except OSError:
        return
    for entry in entries:
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            yield from _below(entry.path, above | {here})
        elif entry.name.endswith((".yaml", ".yml", ".json")):
            try:
                yield _mark(entry.path, entry.stat())
            except OSError:  # removed meanwhile, or a dangling link
                yield entry.path, 0, 0, 0
