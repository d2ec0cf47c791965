"""Find and read files without trusting the folder they are in."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import TypeAlias

from saeguard.errors import SaeguardError
from saeguard.yaml_files.codes import Code
from saeguard.yaml_files.findings import Finding

MAX_FILES = 20_000
TEST_SUFFIX = ".test.yaml"

_Inode: TypeAlias = tuple[int, int]


def find_files(path: Path) -> tuple[list[Path], list[Finding]]:
    """Return `path` itself, or the `*.yaml` files below it, sorted; and findings about the folder.

    Names that start with a dot are left out, as a Kubernetes ConfigMap volume keeps second
    copies of its files below `..data`. Linked folders are followed, except into themselves.

    Args:
        path: a file or a folder.
    """
    files: list[str] = []
    errors: list[Finding] = []
    root = os.fspath(path)
    waiting: list[tuple[str, frozenset[_Inode]]] = [(root, frozenset())]
    while waiting:
        here, above = waiting.pop()
        try:
            # Text instead of Path, here and below: making a Path costs more than the system call.
            if stat.S_ISDIR(os.stat(here).st_mode):  # noqa: PTH116
                waiting += _entries(here, above, files)
            elif here == root or _is_yaml(here):
                files.append(here)
        except FileNotFoundError:
            errors.append(
                _whole(Path(here), "not-found", "there is no such file or folder; check the path")
            )
        except (OSError, ValueError) as error:  # ValueError: a NUL in the path
            reason = getattr(error, "strerror", error)
            errors.append(_whole(Path(here), "unreadable", f"cannot be read: {reason}"))
        except _PlaceError as error:
            errors.append(_whole(Path(here), error.code, str(error)))
        if len(files) > MAX_FILES:
            message = f"there are more than {MAX_FILES:,} files here; load fewer"
            return [], [_whole(path, "too-many-files", message)]
    in_order = sorted(files, key=lambda file: file.split(os.sep))  # noqa: PTH206
    return [Path(file) for file in in_order], errors


def is_test(path: Path) -> bool:
    """Return whether a file holds tests rather than a policy."""
    return path.name.endswith(TEST_SUFFIX)


class _PlaceError(SaeguardError):
    def __init__(self, code: Code, message: str) -> None:
        super().__init__(message)
        self.code: Code = code


def _entries(
    folder: str, above: frozenset[_Inode], files: list[str]
) -> list[tuple[str, frozenset[_Inode]]]:
    """Add a folder's plain policy files to `files`, and return what must be looked at."""
    status = os.stat(folder)  # noqa: PTH116
    here = (status.st_dev, status.st_ino)
    if here in above:
        message = "this link leads back to a folder above it; remove it"
        raise _PlaceError("link-loop", message)
    others = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.name.endswith(".yaml") and entry.is_file(follow_symlinks=False):
                files.append(entry.path)
            else:  # a link into nothing may have been a folder of policies
                others.append((entry.path, above | {here}))
    return others


def _is_yaml(path: str) -> bool:
    if path.endswith(".yml"):
        name = os.path.basename(path).removesuffix(".yml")  # noqa: PTH119
        message = f'policy files end in .yaml; rename it to "{name}.yaml"'
        raise _PlaceError("file-name", message)
    return path.endswith(".yaml")


def _whole(path: Path, code: Code, message: str) -> Finding:
    return Finding(path, 0, 0, code, message)
