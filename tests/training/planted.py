"""Activations with known features in them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from saeguard.training.activations import Block, Counts

D, FEATURES = 32, 48
CHANCE = 0.05
"""Of a feature, to be active on a token."""


@dataclass(frozen=True)
class Planted:
    """Sums of a few of `FEATURES` random directions, far from the origin."""

    rows: int = 4096

    @property
    def directions(self) -> torch.Tensor:
        """[FEATURES, D], unit rows."""
        drawn = torch.randn(FEATURES, D, generator=torch.Generator().manual_seed(11))
        return drawn / drawn.norm(dim=1, keepdim=True)

    def block(self, at: int) -> Block:
        """Draw the block at a position."""
        draw = torch.Generator().manual_seed(1000 + at)
        active = torch.rand(self.rows, FEATURES, generator=draw) < CHANCE
        strength = 10 + 10 * torch.rand(self.rows, FEATURES, generator=draw)
        x = (active * strength) @ self.directions + 0.05 * torch.randn(self.rows, D, generator=draw)
        return Block(x + 3.0, at + 1, Counts(1, len(x)))
