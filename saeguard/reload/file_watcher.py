"""Notice that files have changed, however they were: edited, renamed over, or a link turned.

The system tells of changes through `watchfiles`, which vLLM brings along. What it does not tell,
a network file system or a folder that was replaced as a whole, a look at every file's date does,
once in a while.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

SETTLE_MS = 30
"""Changes within this time are one."""
LOOK_S = 2.0
"""How often everything is looked at."""


def changes(roots: Iterable[Path], stop: threading.Event) -> Iterator[None]:
    """Yield after each change below `roots`, until `stop` is set."""
    roots = tuple(roots)
    seen = fingerprint(roots)
    while not stop.is_set():
        for _ in _told(roots, stop):
            now = fingerprint(roots)
            if now != seen:
                seen = now
                yield
            if now is None:  # gone as a whole: what comes in its place must be watched anew
                break


def _told(roots: tuple[Path, ...], stop: threading.Event) -> Iterator[None]:
    """Yield at each change the system tells of, and every `LOOK_S`, until watching breaks off."""
    from watchfiles import watch  # noqa: PLC0415 - brought by vLLM, and needed by nobody else

    identity = _identity(roots)
    if None in identity:
        stop.wait(LOOK_S / 4)
        yield
        return
    try:
        told = watch(
            *roots,
            watch_filter=None,  # Kubernetes' links begin with two dots, editors' files anyhow
            debounce=200,
            step=SETTLE_MS,
            stop_event=stop,
            rust_timeout=int(1000 * LOOK_S),
            yield_on_timeout=True,
            ignore_permission_denied=True,
        )
        for _ in told:
            yield
            if _identity(roots) != identity:
                return
    except (FileNotFoundError, OSError):  # removed in between, or no watch is to be had
        stop.wait(LOOK_S / 4)
        yield


def _identity(roots: Iterable[Path]) -> tuple[Any, ...]:
    """Return what changes where another folder stands under the same name."""
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
    """Return what changes when a YAML or JSON file below does; None where a root is missing."""
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
            except OSError:  # gone in between, or a link into nothing
                yield entry.path, 0, 0, 0
