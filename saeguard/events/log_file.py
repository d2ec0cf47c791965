"""Append whole lines to a file that may be renamed, cut off, or on a full disk."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

END = b"\n"


class LogFile:
    """A file that several processes append lines to; each line is one write, so lines do not mix.

    If another file has its name by the next line, or none has, that one is written to: so a log is
    rotated by renaming it, with or without a signal. Cutting it off in place works, too.
    """

    def __init__(self, path: Path) -> None:
        """Open `path` for appending; it and its folder are made if they are missing.

        Raises:
            OSError: it cannot be opened.
        """
        self.path = path
        self._file = -1
        self._end = 0
        """Size of the file after the last line of this process."""
        self._open()

    def write(self, line: bytes) -> int:
        """Append a line, which ends with a newline; return its length.

        If the file ends within a line, as after a full disk or a power cut, that line is ended
        first.

        Raises:
            OSError: the line was not written as a whole.
        """
        self._follow()
        with self._alone():
            size = os.fstat(self._file).st_size
            torn = size not in {0, self._end} and self._ends_within_a_line(size)
            written = os.write(self._file, END + line if torn else line)
            self._end = size + written
        if written != len(line) + torn:
            self._end = -1
            raise OSError(errno.ENOSPC, "an event was cut off")
        return len(line)

    def flush(self) -> None:
        """Do nothing: each line is written at once."""

    def close(self) -> None:
        """Close the file."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _open(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        flags = os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
        how = os.O_WRONLY
        if not self.path.exists() or self.path.is_file():  # a pipe opened both ways never breaks
            how = os.O_RDWR
        try:
            file = os.open(self.path, how | flags, 0o666)
        except PermissionError:  # a log that may be written to and not read
            file = os.open(self.path, os.O_WRONLY | flags, 0o666)
        self.close()
        self._file, self._end = file, -1

    def _follow(self) -> None:
        """Open the file that has the log's name now, if it is another one."""
        mine = os.fstat(self._file)
        if not stat.S_ISREG(mine.st_mode):
            return
        try:
            there = self.path.stat()
        except FileNotFoundError:
            there = None
        if there is not None and (there.st_dev, there.st_ino) == (mine.st_dev, mine.st_ino):
            return
        try:
            self._open()
        except OSError:
            if mine.st_nlink == 0:  # removed: what is written to it is lost
                raise
            # Renamed, and no other may be made: the renamed one takes the lines.

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Keep the other processes' writes out, which would look like a torn line half-way."""
        with suppress(OSError):  # a file system without locks
            fcntl.flock(self._file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            with suppress(OSError):
                fcntl.flock(self._file, fcntl.LOCK_UN)

    def _ends_within_a_line(self, size: int) -> bool:
        try:
            return os.pread(self._file, 1, size - 1) != END
        except OSError:  # not open for reading
            return self._end < 0
