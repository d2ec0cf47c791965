"""Several tensors as one buffer of bytes, on their way from a device to the host."""

from __future__ import annotations

import numpy as np
import torch

from saeguard.guard.packed import BYTES, Buffers


def tensors(rows: int, seed: int = 0) -> list[torch.Tensor]:
    """Return what a pass brings: positions, ticks, activations, flags, and nothing at all."""
    torch.manual_seed(seed)
    return [
        torch.arange(rows) + seed,
        torch.ones(1, dtype=torch.int64),
        torch.randn(rows + 3, 5)[:rows],
        torch.rand(rows, 7)[:, :6],
        torch.rand(rows) > 0.5,
        torch.rand(rows, 0) > 0.5,
    ]


def test_what_is_packed_comes_back() -> None:
    """Values, types and shapes, of parts of larger tensors, too, for small and large passes."""
    buffers = Buffers(pinned=False)
    for rows in (1, 3, BYTES // 16):
        given = tensors(rows)
        found = buffers.unpack(buffers.fetch(given))
        assert len(found) == len(given)
        for mine, theirs in zip(found, given, strict=True):
            assert mine.dtype == theirs.numpy().dtype
            np.testing.assert_array_equal(mine, theirs.numpy())


def test_a_pass_under_way_is_never_overwritten() -> None:
    """With several passes in flight, each has a buffer of its own until it was read."""
    buffers = Buffers(pinned=False)
    under_way = [buffers.fetch(tensors(4, seed)) for seed in range(5)]
    for seed in (3, 0, 4, 2, 1):
        found = buffers.unpack(under_way[seed])
        buffers.unpack(buffers.fetch(tensors(4, seed + 100)))
        np.testing.assert_array_equal(found[0], np.arange(4) + seed)
        np.testing.assert_array_equal(found[2], tensors(4, seed)[2].numpy())


def test_a_steady_server_allocates_none() -> None:
    """The buffer that was read is the next pass's."""
    buffers = Buffers(pinned=False)
    used = set()
    for seed in range(6):
        packed = buffers.fetch(tensors(4, seed))
        used.add(packed.buffer.data_ptr())
        buffers.unpack(packed)
    assert len(used) == 1
