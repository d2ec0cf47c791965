"""Latents that fire by rank: TopK and groupmax SAEs behind the tap, at nearly no cost.

What a watched latent's rank is matters only on a token where its pre-activation is high enough
for some policy. So a token is screened first: where no watched latent clears its *bar*, the
lowest activation at which any policy could notice it, no policy can hold whatever the ranks are,
and the token's latents are shown as silent. The few tokens that pass are ranked exactly, all of
their watched latents.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import torch

from saeguard.features.types import Feature
from saeguard.sae.checkpoint_info import SaeInfo
from saeguard.sae.encode import activate
from saeguard.sae.encoder import Encoder
from saeguard.sae.errors import SaeError
from saeguard.sae.rows import EncoderRows
from saeguard.sae.topk_watched import Competitors, drop, read_competitors

if TYPE_CHECKING:
    from saeguard.guard.kernels.topk import TopKBuffers

ROUNDING = 1e-5
"""By how much, relatively, a bar lies below where real numbers would put it: the rules round."""


@dataclass(frozen=True, slots=True)
class RankedRows:
    """Which columns of a hook fire by rank, and from where on that matters."""

    source: SaeInfo | Encoder
    columns: slice
    """Among the hook's."""
    latents: tuple[int, ...]
    screen: torch.Tensor
    """[latents] float32; +inf for a latent that alone makes no policy hold."""

    @property
    def competitors(self) -> str:
        """Return what tells the competitors of these latents from those of others."""
        source = self.source
        return f"{source.sha256} {source.k}" if isinstance(source, SaeInfo) else str(id(source))


@dataclass(frozen=True, slots=True)
class Ranked:
    """The same on the model's device, with the encoder of everything that competes."""

    competitors: Competitors
    columns: slice
    rows: EncoderRows
    """Of the latents: views of what the tap holds."""
    screen: torch.Tensor
    shown: torch.Tensor
    """[] bool: whether activations show whatever their rank, for the start-up self-test."""
    buffers: TopKBuffers | None = None
    """On a GPU: where its kernels count."""


def make_ranked(
    part: RankedRows,
    rows: EncoderRows,
    device: torch.device,
    *,
    allocate_buffers: Callable[[Competitors, int], TopKBuffers] | None = None,
) -> Ranked:
    """Bring what competes to the device.

    Args:
        part: which of the hook's columns.
        rows: of all the hook's columns, on the device.
        device: of the model.
        allocate_buffers: that of `saeguard.guard.kernels.topk` for passes of some size, on a GPU.

    Raises:
        SaeError: the weights are damaged, or the tap runs on a GPU without Triton, where which
            tokens pass would have to be asked of the device in every pass.
    """
    if device.type == "cuda" and allocate_buffers is None:
        raise SaeError(
            "ranking the latents of TopK and groupmax SAEs on a GPU needs Triton, which is not "
            "installed: `pip install triton`, or let measured thresholds stand for ranks, an "
            "approximation: `saeguard features calibrate --topk approximate`"
        )
    competitors = load_competitors(part.source, part.latents, device)
    return Ranked(
        competitors=competitors,
        columns=part.columns,
        rows=EncoderRows(*(t[part.columns] for t in (rows.W, rows.b, rows.theta))),
        screen=part.screen.to(device),
        shown=torch.zeros((), dtype=torch.bool, device=device),
        buffers=None
        if allocate_buffers is None
        else allocate_buffers(competitors, len(part.latents)),
    )


@lru_cache(maxsize=8)
def load_competitors(
    source: SaeInfo | Encoder, latents: tuple[int, ...], device: torch.device
) -> Competitors:
    """Return what competes, read once a process."""
    return read_competitors(source, latents, device)


def set_floor(ranked: Ranked, floor: torch.Tensor) -> None:
    """Write from where on the latents' activations show, into [watched] float32.

    Above its threshold and its bar: so the screen is the comparison that the tap makes anyway.
    """
    theta = ranked.rows.theta
    high = torch.maximum(theta, ranked.screen)
    floor[ranked.columns] = torch.where(ranked.shown, theta, high)


def apply_topk(ranked: Ranked, x: torch.Tensor, f: torch.Tensor) -> None:
    """Leave of `f` [rows, watched] what fires, in place.

    Args:
        ranked: which columns, and their rivals.
        x: [rows, d_in] float32.
        f: `z * (z > floor)` on entry, NaN where it cannot be known, which it stays.
    """
    mine = f[:, ranked.columns]
    # Nearly always nothing passes. Nothing is negative, and a sum is the cheapest that tells.
    if float(mine.sum()) == 0.0 or ranked.shown:
        return
    rows = (mine > 0).any(1).nonzero()[:, 0]
    if len(rows):
        passed = x[rows]
        some = activate(ranked.rows, passed, ranked.competitors.encoder.norm)
        drop(ranked.competitors, passed, some)
        mine[rows] = some


def screen_thresholds(
    latents: Iterable[int],
    lowest: Iterable[tuple[Feature, float]],
    exact: frozenset[int] = frozenset(),
) -> torch.Tensor:
    """Return from which activation on each latent matters, [latents] float32.

    A feature's value `sum(weight * f)` exceeds `v` only if one of its `n` positive terms
    exceeds `v / n`; ranks only ever take away.

    Args:
        latents: the watched ones.
        lowest: features with the lowest value that any policy compares them with.
        exact: latents of which every activation counts: an edit takes it off, a mean adds it up.
    """
    out = dict.fromkeys(latents, torch.inf)
    for feature, value in lowest:
        # What holds in silence can be ended by any latent, so all of them matter.
        positive = [
            term for term in feature.detect if term.weight > 0 or (value < 0 and term.weight)
        ]
        for term in positive:
            share = value / (len(positive) * abs(term.weight))
            screen = max(share, 0.0) * (1 - ROUNDING)
            out[term.latent] = min(out[term.latent], screen)
    return torch.tensor([0.0 if n in exact else screen for n, screen in out.items()])
