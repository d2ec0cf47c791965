"""Decide on which tokens the watched latents of TopK and groupmax SAEs fire.

Such a latent fires if its rank among its competitors is high enough. The rank matters only on
tokens on which the latent's activation is high enough for some policy. So each watched latent has a
screen threshold, the lowest activation at which any policy could notice it. If no watched latent of
a token exceeds its screen threshold, the ranks change no decision, and the token's activations are
written as 0. On the few tokens that pass the screen, every watched latent is ranked exactly.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch

from saeguard.guard.kernels.topk_buffers import TopKBuffers
from saeguard.sae.checkpoint_info import SaeInfo
from saeguard.sae.encode import activate
from saeguard.sae.encoder import Encoder
from saeguard.sae.errors import SaeError
from saeguard.sae.rows import EncoderRows
from saeguard.sae.topk_watched import Competitors, drop, read_competitors


@dataclass(frozen=True, slots=True)
class RankedRows:
    """A block of a hook's columns whose latents fire by rank, as the watch list holds it."""

    source: SaeInfo | Encoder
    columns: slice
    """Among the columns of the hook."""
    latents: tuple[int, ...]
    screen: torch.Tensor
    """[latents] float32 screen thresholds; +inf for a latent that can raise no feature that a
    selection compares."""

    @property
    def competitors(self) -> str:
        """Return a string that identifies the latents with which these compete."""
        source = self.source
        return f"{source.sha256} {source.k}" if isinstance(source, SaeInfo) else str(id(source))


@dataclass(frozen=True, slots=True)
class Ranked:
    """The same block on the model's device, with the encoder rows of all competitors."""

    competitors: Competitors
    columns: slice
    rows: EncoderRows
    """Of the latents: views of the tap's buffers."""
    screen: torch.Tensor
    show_all: torch.Tensor
    """[] bool: skip the ranking and report every activation; the start-up self-test sets it."""
    buffers: TopKBuffers | None = None
    """The buffers of the kernels on a GPU; None elsewhere."""


def make_ranked(
    part: RankedRows,
    rows: EncoderRows,
    device: torch.device,
    *,
    allocate_buffers: Callable[[Competitors, int], TopKBuffers] | None = None,
) -> Ranked:
    """Return a block of columns on the device, with the encoder rows of all its competitors.

    Args:
        part: the block.
        rows: of all the hook's columns, on the device.
        device: of the model.
        allocate_buffers: that of `saeguard.guard.kernels.topk_buffers` for a GPU, else None.

    Raises:
        SaeError: the weights are damaged, or the tap runs on a GPU without Triton: without the
            kernels the host would have to wait for the device in every forward pass.
    """
    if device.type == "cuda" and allocate_buffers is None:
        raise SaeError(
            "ranking the latents of TopK and groupmax SAEs on a GPU needs Triton, which is not "
            "installed: `pip install triton`, or replace ranks by measured thresholds, an "
            "approximation: `saeguard features calibrate --topk approximate`"
        )
    competitors = load_competitors(part.source, part.latents, device)
    return Ranked(
        competitors=competitors,
        columns=part.columns,
        rows=EncoderRows(*(t[part.columns] for t in (rows.W, rows.b, rows.theta))),
        screen=part.screen.to(device),
        show_all=torch.zeros((), dtype=torch.bool, device=device),
        buffers=None
        if allocate_buffers is None
        else allocate_buffers(competitors, len(part.latents)),
    )


@lru_cache(maxsize=8)
def load_competitors(
    source: SaeInfo | Encoder, latents: tuple[int, ...], device: torch.device
) -> Competitors:
    """Return the competitors of `latents` on the device; the result is cached."""
    return read_competitors(source, latents, device)


def set_floor(ranked: Ranked, floor: torch.Tensor) -> None:
    """Write the floors of the block's columns into `floor` [watched] float32.

    A floor is the larger of the SAE's threshold and the screen threshold. So the comparison that
    the tap makes anyway also screens the tokens. With `show_all`, it is the SAE's threshold.
    """
    theta = ranked.rows.theta
    high = torch.maximum(theta, ranked.screen)
    floor[ranked.columns] = torch.where(ranked.show_all, theta, high)


def apply_topk(ranked: Ranked, x: torch.Tensor, f: torch.Tensor) -> None:
    """Set the latents in `f` [rows, watched] that do not fire by rank to 0, in place.

    Args:
        ranked: the block of columns and its competitors.
        x: [rows, d_in] float32.
        f: `z * (z > floor)` on entry. NaN stays NaN.
    """
    mine = f[:, ranked.columns]
    # No activation is negative, so the sum is 0 exactly if no token passes, which is nearly always.
    if float(mine.sum()) == 0.0 or ranked.show_all:
        return
    rows = (mine > 0).any(1).nonzero()[:, 0]
    if len(rows):
        passed = x[rows]
        some = activate(ranked.rows, passed, ranked.competitors.encoder.norm)
        drop(ranked.competitors, passed, some)
        mine[rows] = some
