"""Active latents as a list: one entry per token and active latent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

SMALL = 1 << 17
"""Entries up to which one call takes less time than the several that look at eight at a time."""


@dataclass(frozen=True, slots=True)
class Sparse:
    """Active latents: one entry per token and active latent, in no particular order."""

    token: torch.Tensor
    """[entries] int64."""
    latent: torch.Tensor
    """[entries] int64."""
    value: torch.Tensor
    """[entries] float32; positive, but for formats that keep what TopK chose below zero."""

    def __len__(self) -> int:
        return len(self.value)

    def cpu(self) -> Sparse:
        """Return the same in the host's memory."""
        return Sparse(self.token.cpu(), self.latent.cpu(), self.value.cpu())

    def pick(self, which: np.ndarray) -> Sparse:
        """Return the entries of these indices, int64."""
        at = torch.from_numpy(which).to(self.token.device)
        return Sparse(self.token[at], self.latent[at], self.value[at])


def above(z: torch.Tensor, floor: torch.Tensor, token: int, latent: int) -> Sparse:
    """Return the entries of `z` that lie above `floor`.

    Args:
        z: [tokens, latents], contiguous; the latents may be split into groups.
        floor: broadcasts to `z`.
        token: the first token of `z`.
        latent: the first latent of `z`.
    """
    width = z.numel() // len(z)
    if z.device.type == "cpu":  # NumPy compares and finds several times faster than torch
        values = z.numpy()
        where = _indices((values > floor.numpy()).reshape(-1))
        of = where // width
        return Sparse(
            torch.from_numpy(of + token),
            torch.from_numpy(where - of * width + latent),
            torch.from_numpy(values.reshape(-1)[where]),
        )
    at = (z > floor).reshape(-1).nonzero().reshape(-1)
    row = torch.div(at, width, rounding_mode="floor")
    return Sparse(row + token, at - row * width + latent, z.reshape(-1)[at])


def _indices(mask: np.ndarray) -> np.ndarray:
    """Return the indices at which `mask` holds; large masks are read eight entries at a time."""
    if len(mask) < SMALL:
        return np.flatnonzero(mask)
    eights = np.packbits(mask)
    some = np.flatnonzero(eights.view(bool))
    at = np.flatnonzero(np.unpackbits(eights[some]).view(bool))
    indices: np.ndarray = (some[at >> 3] << 3) + (at & 7)
    return indices


def concatenate(parts: Sequence[Sparse], device: torch.device) -> Sparse:
    """Return the entries of all parts."""
    if len(parts) == 1:
        return parts[0]
    if not parts:
        empty = torch.empty(0, dtype=torch.int64, device=device)
        return Sparse(empty, empty, torch.empty(0, device=device))
    return Sparse(
        torch.cat([p.token for p in parts]),
        torch.cat([p.latent for p in parts]),
        torch.cat([p.value for p in parts]),
    )
