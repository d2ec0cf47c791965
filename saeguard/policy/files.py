"""Find and read files without trusting the folder they are in."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import TypeAlias

from saeguard.policy.errors import Code, PolicyError
from saeguard.policy.yamlmarks import MAX_BYTES

MAX_FILES = 20_000
TEST_SUFFIX = ".test.yaml"

_Inode: TypeAlias = tuple[int, int]


def find_files(path: Path) -> tuple[list[Path], list[PolicyError]]:
    """Return `path` itself, or the `*.yaml` files below it, sorted, and what is wrong there.

    Names that start with a dot are left out, as a Kubernetes ConfigMap volume keeps second
    copies of its files below `..data`. Linked folders are followed, except into themselves.

    Args:
        path: a file or a folder.
    """
    files: list[Path] = []
    errors: list[PolicyError] = []
    waiting: list[tuple[Path, frozenset[_Inode]]] = [(path, frozenset())]
    while waiting:
        here, above = waiting.pop()
        try:
            if here.is_dir():
                waiting += _entries(here, above)
            elif here is path or _is_yaml(here):
                here.stat()
                files.append(here)
            else:
                here.stat()  # a link into nothing may have been a folder of policies
        except FileNotFoundError:
            errors.append(_whole(here, "not-found", "there is no such file or folder"))
        except (OSError, ValueError) as error:  # ValueError: a NUL in the path
            reason = getattr(error, "strerror", error)
            errors.append(_whole(here, "unreadable", f"cannot be read: {reason}"))
        except _PlaceError as error:
            errors.append(_whole(here, error.code, str(error)))
        if len(files) > MAX_FILES:
            message = f"there are more than {MAX_FILES:,} files here; load fewer"
            return [], [_whole(path, "too-many-files", message)]
    return sorted(files), errors


def is_test(path: Path) -> bool:
    """Return whether a file holds tests rather than a policy."""
    return path.name.endswith(TEST_SUFFIX)


def read_bytes(path: Path) -> bytes | PolicyError:
    """Return the content, cut off just above the size limit."""
    try:
        # Opening a named pipe would wait for a writer.
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
            if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                return file.read(MAX_BYTES + 1)
    except OSError as error:
        return _whole(path, "unreadable", f"cannot be read: {error.strerror}")
    return _whole(path, "unreadable", "this is not a regular file")


class _PlaceError(Exception):
    def __init__(self, code: Code, message: str) -> None:
        super().__init__(message)
        self.code: Code = code


def _entries(folder: Path, above: frozenset[_Inode]) -> list[tuple[Path, frozenset[_Inode]]]:
    status = folder.stat()
    here = (status.st_dev, status.st_ino)
    if here in above:
        message = "this link leads back to a folder above it; remove it"
        raise _PlaceError("link-loop", message)
    entries = [entry for entry in folder.iterdir() if not entry.name.startswith(".")]
    return [(entry, above | {here}) for entry in entries]


def _is_yaml(path: Path) -> bool:
    if path.suffix == ".yml":
        message = f'policy files end in .yaml; rename it to "{path.stem}.yaml"'
        raise _PlaceError("file-name", message)
    return path.suffix == ".yaml"


def _whole(path: Path, code: Code, message: str) -> PolicyError:
    return PolicyError(path, 0, 0, code, message)
