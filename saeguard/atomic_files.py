"""Write files so that they appear complete or not at all."""

from __future__ import annotations

import os
import secrets
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path


def write_atomically(path: Path, content: str | bytes, *, private: bool = False) -> None:
    """Write `content` to `path`; a reader sees the old content or all of the new.

    Whatever ends the writing early, an interrupt included, leaves the old content and no other
    file. Missing folders are made.

    Args:
        path: of the file.
        content: text is written as UTF-8.
        private: let only the owner read the file.

    Raises:
        OSError: the file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with staged(path, content, private=private) as part:
        part.replace(path)


def write_new(files: Mapping[Path, str], *, private: Collection[Path] = ()) -> None:
    """Write files that do not exist yet, and the folders they need; all of them or none.

    Args:
        files: their texts.
        private: the files that only their owner may read.

    Raises:
        OSError: a file exists or cannot be written; no file and no folder is left behind.
    """
    made: list[Path] = []
    try:
        for path, text in files.items():
            missing = [folder for folder in path.parents if not os.path.lexists(folder)]
            for folder in reversed(missing):
                folder.mkdir()
                made.append(folder)
            with staged(path, text, private=path in private) as part:
                path.hardlink_to(part)  # a rename would replace a file made in the meantime
            made.append(path)
    except BaseException:
        for path in reversed(made):
            with suppress(OSError):  # a folder of ours may hold another program's file by now
                path.rmdir() if path.is_dir() else path.unlink()
        raise


@contextmanager
def staged(path: Path, content: str | bytes, *, private: bool = False) -> Iterator[Path]:
    """Write a temporary file beside `path`, for the block to check and rename.

    The file is removed at the end of the block unless it was renamed.

    Args:
        path: that the file will get.
        content: text is written as UTF-8.
        private: let only the owner read the file.

    Raises:
        OSError: the file cannot be written.
    """
    part = path.with_name(f".{path.name[:200]}.{secrets.token_hex(4)}")
    try:
        try:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            handle = os.open(part, flags, 0o600 if private else 0o666)
        except OSError as error:  # which names the temporary file
            raise OSError(error.errno, error.strerror, str(path)) from error
        with os.fdopen(handle, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        yield part
    finally:
        part.unlink(missing_ok=True)
