"""Several small tensors of a device as one buffer of bytes: one launch packs, one copy fetches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

BYTES = 2**20
"""Most bytes of a buffer that is kept for later passes; it holds any decode step's few rows."""


class Packed(NamedTuple):
    """Tensors on their way to the host, in one buffer."""

    buffer: torch.Tensor
    """[bytes] uint8 on the host, pinned if a GPU fills it; at least as long as the content."""
    parts: tuple[tuple[torch.dtype, torch.Size], ...]
    """Of each tensor."""


class Buffers:
    """Host buffers that passes take and give back, so that a steady server allocates none.

    A buffer is in use from `fetch` until `unpack`, however many passes are under way; a pass that
    finds none allocates one. So none is ever overwritten before it was read.
    """

    def __init__(self, *, pinned: bool) -> None:
        """Start without buffers."""
        self._pinned = pinned
        self._free: list[torch.Tensor] = []

    def fetch(self, tensors: Sequence[torch.Tensor]) -> Packed:
        """Start to copy tensors of one device to the host; those of wide elements come first."""
        flat = torch.cat([t.contiguous().reshape(-1).view(torch.uint8) for t in tensors])
        buffer = self._take(len(flat))
        buffer[: len(flat)].copy_(flat, non_blocking=True)
        return Packed(buffer, tuple((t.dtype, t.shape) for t in tensors))

    def unpack(self, packed: Packed) -> list[np.ndarray]:
        """Return the tensors as arrays of their own, and keep the buffer for a later pass.

        The copy must have ended.
        """
        sizes = [dtype.itemsize * shape.numel() for dtype, shape in packed.parts]
        content = packed.buffer.numpy()[: sum(sizes)].copy()
        if len(packed.buffer) == BYTES:
            self._free.append(packed.buffer)
        arrays, start = [], 0
        for (dtype, shape), size in zip(packed.parts, sizes, strict=True):
            part = torch.from_numpy(content[start : start + size]).view(dtype)
            arrays.append(part.reshape(shape).numpy())
            start += size
        return arrays

    def _take(self, size: int) -> torch.Tensor:
        if size > BYTES:
            return torch.empty(size, dtype=torch.uint8, pin_memory=self._pinned)
        try:
            return self._free.pop()  # another thread may unpack, so ask for no length first
        except IndexError:
            return torch.empty(BYTES, dtype=torch.uint8, pin_memory=self._pinned)
