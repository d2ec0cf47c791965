"""Follow a log that a server writes, also when log rotation gives its name to a new file."""

from __future__ import annotations

from pathlib import Path
from typing import IO


class Follower:
    """Reads what is appended to a log, whole lines at a time."""

    def __init__(self, path: Path) -> None:
        """Start at the end of the last whole line that is there now."""
        self._path = path
        self._file: IO[bytes] = path.open("rb")
        self._rest = b""
        content = self._file.read()
        self._rest = content[content.rfind(b"\n") + 1 :]

    def read(self) -> bytes:
        """Return the lines that were completed since the last call."""
        new = self._rest + self._file.read()
        following = self._next()
        if following is not None:
            new += following.read()
            self._file.close()
            self._file = following
        end = new.rfind(b"\n") + 1
        self._rest = new[end:]
        return new[:end]

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _next(self) -> IO[bytes] | None:
        """Return the file that has the log's name now, None if it is the one that is open."""
        try:
            there, here = self._path.stat(), Path(f"/dev/fd/{self._file.fileno()}").stat()
        except FileNotFoundError:  # between the two steps of a rotation
            return None
        if there.st_ino == here.st_ino and there.st_size >= self._file.tell():
            return None
        return self._path.open("rb")
