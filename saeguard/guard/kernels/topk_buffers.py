"""Counters and lists that the TopK kernels write; allocating them needs no Triton."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from saeguard.sae.topk_watched import Competitors

PAIRS = 1 << 16
"""Close pairs that the buffers hold for one forward pass."""


@dataclass(frozen=True, slots=True)
class TopKBuffers:
    """What the TopK kernels count and list in one forward pass.

    The listed tokens are those that passed the screen; `entry` is a token's index among them.
    """

    counters: torch.Tensor
    """[3] int32, see `topk_kernels.LISTED`."""
    listed: torch.Tensor
    """[max_tokens] int32 row of each listed token."""
    open: torch.Tensor
    """[max_tokens] int32 entry of each listed token that is not decided yet."""
    margin: torch.Tensor
    """[max_tokens] float32 by entry: gaps that float32 cannot decide, see `sae.topk_all.Reach`."""
    above: torch.Tensor
    """[max_tokens, watched] int32 by entry: competitors surely above the latent."""
    near: torch.Tensor
    """[max_tokens, watched] int32 by entry: competitors too close to decide in float32."""
    pair: torch.Tensor
    """[PAIRS, 2] int32: index into the flattened `above`, and the competitor."""
    extent: tuple[float, float]
    """The largest norm of a competitor's encoder row, and the largest absolute bias."""


def allocate_buffers(
    competitors: Competitors, watched: int, *, max_tokens: int, pairs: int = PAIRS
) -> TopKBuffers:
    """Allocate the buffers for passes of up to `max_tokens` rows."""
    device = competitors.rows.b.device

    def zeros(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.int32, device=device)

    assert competitors.encoder.longest is not None
    return TopKBuffers(
        counters=zeros(3),
        listed=zeros(max_tokens),
        open=zeros(max_tokens),
        margin=torch.zeros(max_tokens, device=device),
        above=zeros(max_tokens, watched),
        near=zeros(max_tokens, watched),
        pair=zeros(pairs, 2),
        extent=competitors.encoder.longest,
    )
