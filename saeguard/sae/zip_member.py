"""Read a compressed member of an npz file, a zip archive, from its beginning."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path
from typing import Self

from saeguard.sae.errors import SaeError

CHUNK = 4 << 20
"""Bytes inflated at once."""


def refused(file: Path, why: str) -> SaeError:
    """Return the error for an npz file that cannot be read."""
    return SaeError(f"{file}: not a complete npz file: {why}; copy or download it again")


class Inflated:
    """The bytes of one array in a compressed member; what lies before them is inflated too."""

    def __init__(self, path: Path, member: str, start: int) -> None:
        self._path, self._member, self._start = path, member, start

    def __enter__(self) -> Self:
        try:
            self._archive = zipfile.ZipFile(self._path)
            self._stream = self._archive.open(self._member)
            self._at = -self._start
            self._pass(0)
        except (zipfile.BadZipFile, OSError, EOFError, zlib.error) as error:
            raise refused(self._path, f"{self._member}: {error}") from error
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()
        self._archive.close()

    def read(self, offset: int, size: int) -> bytes:
        """Return `size` bytes of the array from `offset` on; see `tensors.Reader`."""
        try:
            self._pass(offset)
            data = self._stream.read(size)
        except (zipfile.BadZipFile, OSError, EOFError, zlib.error) as error:
            raise refused(self._path, f"{self._member}: {error}") from error
        self._at += len(data)
        if len(data) != size:
            raise refused(self._path, f"{self._member}: it ends too early")
        return data

    def _pass(self, offset: int) -> None:
        while self._at < offset:
            skipped = self._stream.read(min(CHUNK, offset - self._at))
            if not skipped:
                raise EOFError("it ends too early")
            self._at += len(skipped)
