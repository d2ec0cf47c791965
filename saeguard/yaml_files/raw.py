"""Read a file's bytes without trusting the file."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from saeguard.yaml_files.findings import Finding
from saeguard.yaml_files.reader import POLICY, FileKind


def read_bytes(path: Path, kind: FileKind = POLICY) -> bytes | Finding:
    """Return the content, cut off just above the size limit."""
    limit = kind.max_bytes + 1
    try:
        # Opening a named pipe would wait for a writer.
        file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            if stat.S_ISREG(os.fstat(file).st_mode):
                content = os.read(file, limit)
                while len(content) < limit and (more := os.read(file, limit)):
                    content += more
                return content[:limit]
        finally:
            os.close(file)
    except FileNotFoundError:
        return Finding(path, 0, 0, "not-found", "there is no such file")
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = getattr(error, "strerror", error)
        return Finding(path, 0, 0, "unreadable", f"cannot be read: {reason}")
    return Finding(path, 0, 0, "unreadable", "this is not a regular file")
