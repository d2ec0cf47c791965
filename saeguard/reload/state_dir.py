"""The state folder keeps the highest signed revision in use and each engine core's status."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from saeguard.atomic_files import write_atomically
from saeguard.errors import InputError

REVISION = "revision.json"
STATUS = "engine-{}.json"


class StateError(InputError):
    """A file of the state folder cannot be read."""


def read_revision(folder: Path) -> tuple[int, str] | None:
    """Return the highest revision that was in use and its manifest's digest, None before the first.

    Raises:
        StateError: the file exists and cannot be read. Ignoring it would accept an old bundle.
    """
    path = folder / REVISION
    try:
        content = json.loads(path.read_bytes())
        return int(content["revision"]), str(content["manifest"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StateError(
            f"{path}: cannot be read ({error}): it holds the highest revision that was in use; put "
            "it back from a copy, or remove it and set saeguard.verify.revision to what must not "
            "be undercut"
        ) from error


def keep_revision(folder: Path, revision: int, manifest: str) -> None:
    """Record that a revision is in use, unless a higher one is recorded; under a file lock."""
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder):
        seen = read_revision(folder)
        if seen is None or revision > seen[0]:
            content = {"revision": revision, "manifest": manifest}
            write_atomically(folder / REVISION, json.dumps(content) + "\n")


def write_status(folder: Path, engine: int, status: Mapping[str, Any]) -> None:
    """Write the status of one engine core of the server."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / STATUS.format(engine), json.dumps(status) + "\n")


def read_statuses(folder: Path) -> dict[Path, dict[str, Any]]:
    """Return the last status that each engine core wrote, by file."""
    found = {}
    for path in sorted(folder.glob(STATUS.format("*"))):
        try:
            found[path] = json.loads(path.read_bytes())
        except (OSError, ValueError):
            continue  # being removed; a status is written atomically
    return found


def started_at(pid: int) -> str | None:
    """Return the start time of a process; a later process of the same id has another one."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[19]
    except OSError:
        return None


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
