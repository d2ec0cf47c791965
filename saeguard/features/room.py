"""Arrays of residuals: in memory if they are small, in an unlinked file if they are large.

The residuals of many texts at several layers do not fit in memory. The kernel keeps as much of the
file in memory as there is room for. The file vanishes with the process.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence

import torch

from saeguard.errors import InputError

IN_MEMORY = 1 << 30
"""Bytes of the largest array that is held in memory."""


class RoomError(InputError):
    """There is no room on disk for the residuals of the texts."""


def allocate(rows: int, width: int) -> torch.Tensor:
    """Return an array [rows, width] float32 whose values are not set.

    Raises:
        RoomError: it is large, and the folder of temporary files has no room for it.
    """
    size = 4 * rows * width
    if size <= IN_MEMORY:
        return torch.empty(rows, width)
    with tempfile.NamedTemporaryFile(prefix="saeguard-") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            raise RoomError(
                f"{tempfile.gettempdir()}: found no room for {size / 2**30:.1f} GiB of residuals: "
                f"{error.strerror}; set TMPDIR to a folder with more, or give fewer texts or layers"
            ) from error
        return torch.from_file(file.name, shared=True, size=rows * width).view(rows, width)


def taken(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Return the rows of `x` [n, width] at which the mask `rows` [n] is true."""
    which = rows.nonzero()[:, 0]
    return torch.index_select(x, 0, which, out=allocate(len(which), x.shape[1]))


def stacked(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the rows of all `parts` [n, width], one after the other."""
    room = allocate(sum(map(len, parts)), parts[0].shape[1])
    return torch.cat(list(parts), out=room)
