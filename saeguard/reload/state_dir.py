"""What outlives a server: the highest signed revision that was in use; and what it is doing now."""

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
    """The state folder holds something that cannot be what the server wrote."""


def read_revision(folder: Path) -> tuple[int, str] | None:
    """Return the highest revision that was in use and its manifest's digest, None where none was.

    Raises:
        StateError: the file is there and says nothing; to take it for none would let an old bundle
            back in.
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
    """Note that a revision is in use; several engine cores may do so, and it never goes down."""
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder):
        seen = read_revision(folder)
        if seen is None or revision > seen[0]:
            content = {"revision": revision, "manifest": manifest}
            write_atomically(folder / REVISION, json.dumps(content) + "\n")


def write_status(folder: Path, engine: int, status: Mapping[str, Any]) -> None:
    """Say what one engine core of the server is doing."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / STATUS.format(engine), json.dumps(status) + "\n")


def read_statuses(folder: Path) -> dict[Path, dict[str, Any]]:
    """Return what the engine cores said last, by file."""
    found = {}
    for path in sorted(folder.glob(STATUS.format("*"))):
        try:
            found[path] = json.loads(path.read_bytes())
        except (OSError, ValueError):
            continue  # being removed; a status is replaced as a whole
    return found


def started_at(pid: int) -> str | None:
    """Return what tells a process from a later one of the same number, None where there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[19]
    except OSError:
        return None


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
