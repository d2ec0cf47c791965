"""Read parts of stored tensors: rows or columns of a matrix, without the rest of the file.

Each read is a `pread` call of the wanted bytes. A memory map would need fewer lines, but torch's is
private and writable, which Linux refuses for files larger than the memory; the pages a map touches
count as the process's; and a file that is cut while it is mapped kills the process by a signal.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, Self

import numpy as np
import torch

from saeguard.sae.errors import SaeError
from saeguard.sae.zip_member import Inflated

DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
"""Types that are read, by their names in safetensors."""
GAP = 32 << 10
"""Bytes between two wanted parts up to which both are read at once."""


class Reader(Protocol):
    """The bytes of one tensor."""

    def read(self, offset: int, size: int) -> bytes:
        """Return the `size` bytes from `offset` on; offsets of successive calls never go back."""


@dataclass(frozen=True, slots=True)
class Stored:
    """One tensor of a file."""

    dtype: str
    """A key of `DTYPES`, or what the file calls a type that is not read."""
    shape: tuple[int, ...]
    offset: int
    """Of the data: in the file, or in the inflated member."""
    column_major: bool = False
    member: str | None = None
    """Name of a compressed member of a zip archive."""


@dataclass(frozen=True, slots=True)
class TensorFile:
    """The headers of a weight file, and reading from it."""

    path: Path
    tensors: Mapping[str, Stored]

    def take(self, name: str, latents: Sequence[int], axis: int = 0) -> torch.Tensor:
        """Return a tensor's entries at `latents` along `axis`.

        Args:
            name: of a vector or matrix.
            latents: in any order, repeated or not; each must exist.
            axis: of a matrix, the one that counts latents.

        Returns:
            [latents] or [latents, other axis], in the stored dtype, contiguous.

        Raises:
            SaeError: the file cannot be read or ends too early.
        """
        stored = self.tensors[name]
        dtype, shape = DTYPES[stored.dtype], stored.shape
        if len(shape) == 1:
            shape, axis = (1, *shape), 1
        elif stored.column_major:
            shape, axis = shape[::-1], 1 - axis
        unique, inverse = np.unique(np.asarray(latents, np.int64), return_inverse=True)
        with self._reader(stored) as reader:
            read = _rows if axis == 0 else _columns
            found = read(reader, dtype, (shape[0], shape[1]), unique)
        out = found[torch.from_numpy(inverse)]
        return out[:, 0] if len(stored.shape) == 1 else out

    def all(self, name: str) -> torch.Tensor:
        """Return a whole vector, as `take`."""
        return self.take(name, range(self.tensors[name].shape[0]))

    def _reader(self, stored: Stored) -> AbstractContextManager[Reader]:
        if stored.member is None:
            return _Plain(self.path, stored.offset)
        return Inflated(self.path, stored.member, stored.offset)


class _Plain:
    """Bytes that lie in the file as they are."""

    def __init__(self, path: Path, start: int) -> None:
        self._path, self._start = path, start

    def __enter__(self) -> Self:
        try:
            self._file = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise SaeError(f"{self._path}: {error.strerror}") from error
        # Columns lie far apart: to read ahead would be to read the whole encoder.
        os.posix_fadvise(self._file, 0, 0, os.POSIX_FADV_RANDOM)
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._file)

    def read(self, offset: int, size: int) -> bytes:
        parts = []
        while size:
            part = os.pread(self._file, size, self._start + offset)
            if not part:
                raise SaeError(f"{self._path}: the file ends before its tensors do; get it again")
            parts.append(part)
            offset, size = offset + len(part), size - len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)


def _rows(
    reader: Reader, dtype: torch.dtype, shape: tuple[int, int], wanted: np.ndarray
) -> torch.Tensor:
    """Return rows [wanted, columns] of a row-major matrix; `wanted` is sorted."""
    width = shape[1] * dtype.itemsize
    out = torch.empty(len(wanted), shape[1], dtype=dtype)
    for first, last in _runs(wanted, GAP // max(width, 1)):
        a, b = int(wanted[first]), int(wanted[last - 1]) + 1
        block = _tensor(reader.read(a * width, (b - a) * width), dtype).view(b - a, shape[1])
        out[first:last] = block[torch.from_numpy(wanted[first:last] - a)]
    return out


def _columns(
    reader: Reader, dtype: torch.dtype, shape: tuple[int, int], wanted: np.ndarray
) -> torch.Tensor:
    """Return columns [wanted, rows] of a row-major matrix; `wanted` is sorted."""
    size = dtype.itemsize
    out = torch.empty(shape[0], len(wanted), dtype=dtype)
    runs = [
        (first, last, int(wanted[first]), torch.from_numpy(wanted[first:last] - wanted[first]))
        for first, last in _runs(wanted, GAP // size)
    ]
    for row in range(shape[0]):
        for first, last, a, index in runs:
            length = int(index[-1]) + 1
            part = reader.read((row * shape[1] + a) * size, length * size)
            out[row, first:last] = _tensor(part, dtype)[index]
    return out.t().contiguous()


def _runs(wanted: np.ndarray, gap: int) -> list[tuple[int, int]]:
    """Return index ranges `[first, last)` in which neighbours differ by at most `gap` + 1."""
    if not len(wanted):
        return []
    cuts = np.flatnonzero(np.diff(wanted) > gap + 1) + 1
    edges = [0, *cuts.tolist(), len(wanted)]
    return list(itertools.pairwise(edges))


def _tensor(data: bytes, dtype: torch.dtype) -> torch.Tensor:
    # A copy, for torch warns of memory that cannot be written to.
    return torch.frombuffer(bytearray(data), dtype=dtype) if data else torch.empty(0, dtype=dtype)
