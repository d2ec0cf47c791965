"""Files that others may read while they are written: there as a whole, or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path


def write_atomically(path: Path, text: str) -> None:
    """Write `text` to `path` so that a reader sees the old content or all of the new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with _written(path, text, 0o666 & ~_umask()) as part:
        part.replace(path)


def write_new(files: Mapping[Path, str], *, private: Collection[Path] = ()) -> None:
    """Write files that are not there yet, and the folders they need.

    Args:
        files: their texts.
        private: those that nobody but their owner may read.

    Raises:
        OSError: one is there, or cannot be written; then none is left, and no folder either.
    """
    made: list[Path] = []
    try:
        for path, text in files.items():
            missing = [folder for folder in path.parents if not os.path.lexists(folder)]
            for folder in reversed(missing):
                folder.mkdir()
                made.append(folder)
            mode = 0o600 if path in private else 0o666 & ~_umask()
            with _written(path, text, mode) as part:
                path.hardlink_to(part)  # a rename would replace what has come in between
            made.append(path)
    except BaseException:
        for path in reversed(made):
            with suppress(OSError):  # somebody has put something into a folder of ours
                path.rmdir() if path.is_dir() else path.unlink()
        raise


@contextmanager
def _written(path: Path, text: str, mode: int) -> Iterator[Path]:
    """Write `text` beside `path`, for as long as it takes to give it its name."""
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:200]}.")
    except OSError as error:  # about a name that nobody has chosen
        raise OSError(error.errno, error.strerror, str(path)) from error
    part = Path(name)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        part.chmod(mode)  # mkstemp makes it private
        yield part
    finally:
        part.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
