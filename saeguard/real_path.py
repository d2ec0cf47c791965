"""Resolve a path's links, except those of /proc into another process' files."""

from __future__ import annotations

import os
import re
from pathlib import Path

MAGIC = re.compile(r"/proc/(\d+)(/task/\d+)?/(root|cwd|exe|fd/\d+)")
"""Links that lead to the files of a process. What `readlink` returns for one holds in that process
only: in a container, `/proc/PID/root` of another reads as `/`."""
MOST_LINKS = 40
"""As the kernel counts."""


def real_path(path: str | os.PathLike[str]) -> Path:
    """Return an absolute path without links, by which the same file is opened.

    `Path.resolve` replaces `/proc/PID/root` by `/`, which is another folder if that process has
    another root, as the side-car container of a KServe model car. Here such a link stays.

    Args:
        path: need not exist.

    Raises:
        OSError: links lead in a circle.
    """
    text = os.fspath(path)
    waiting = (text if text.startswith("/") else f"{os.getcwd()}/{text}").split("/")[::-1]  # noqa: PTH109 - text, as the rest
    here, links = "", 0
    while waiting:
        part = waiting.pop()
        if part in {"", "."}:
            continue
        if part == "..":
            if MAGIC.fullmatch(here) is None:  # the root of that process, which has no parent
                here = here.rpartition("/")[0]
            continue
        there = f"{here}/{part}"
        target = None if MAGIC.fullmatch(there) else _target(there)
        if target is None:
            here = there
            continue
        links += 1
        if links > MOST_LINKS:
            raise OSError(f"{text}: the links lead in a circle")
        here = "" if target.startswith("/") else here
        waiting += target.split("/")[::-1]
    return Path(here or "/")


def _target(path: str) -> str | None:
    try:
        return os.readlink(path)  # noqa: PTH115 - text
    except (OSError, ValueError):  # no link, not there, or a name that no file can have
        return None
