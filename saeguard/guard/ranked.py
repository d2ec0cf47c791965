"""Latents that fire by rank: TopK and groupmax SAEs behind the tap, at nearly no cost.

What a watched latent's rank is matters only on a token where its pre-activation is high enough
for some policy. So a token is screened first: where no watched latent clears its *bar*, the
lowest activation at which any policy could notice it, no policy can hold whatever the ranks are,
and the token's latents are shown as silent. The few tokens that pass are ranked exactly, all of
their watched latents.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from saeguard.features.types import Feature
from saeguard.guard import triton_rank
from saeguard.sae.info import SaeInfo
from saeguard.sae.rank import Rivals, drop, read_rivals

ROUNDING = 1e-5
"""By how much, relatively, a bar lies lower than the rules' own arithmetic puts it."""


@dataclass(frozen=True, slots=True)
class RankedRows:
    """Which columns of a hook fire by rank, and from where on that matters."""

    source: SaeInfo
    columns: slice
    """Among the hook's."""
    latents: tuple[int, ...]
    bar: torch.Tensor
    """[latents] float32; +inf for a latent that alone makes no policy hold."""


@dataclass(frozen=True, slots=True)
class Ranked:
    """The same on the model's device, with the encoder of everything that competes."""

    rivals: Rivals
    columns: slice
    bar: torch.Tensor
    unranked: torch.Tensor
    """[] float32: 1 shows tokens that do not pass as they are, for the start-up self-test."""
    scratch: triton_rank.Scratch | None
    """Where the tap runs on a GPU."""


def make_ranked(rows: RankedRows, *, max_tokens: int, device: torch.device) -> Ranked:
    """Bring what competes to the device.

    Raises:
        SaeError: the weights are damaged.
    """
    rivals = read_rivals(rows.source, rows.latents, device)
    return Ranked(
        rivals=rivals,
        columns=rows.columns,
        bar=rows.bar.to(device),
        unranked=torch.zeros((), device=device),
        scratch=triton_rank.make_scratch(rivals, max_tokens) if device.type == "cuda" else None,
    )


def settle(ranked: Ranked, x: torch.Tensor, f: torch.Tensor) -> None:
    """Leave of `f` [rows, watched] what fires, in place.

    Args:
        ranked: which columns, and their rivals.
        x: [rows, d_in] float32.
        f: `z * (z > theta)` on entry, NaN where it cannot be known, which it stays.
    """
    mine = f[:, ranked.columns]
    if ranked.scratch is not None:
        triton_rank.settle(ranked.rivals, ranked.scratch, ranked.bar, ranked.unranked, x, mine)
        return
    passed = (mine > ranked.bar).any(1)
    mine.mul_(torch.maximum(passed, ranked.unranked)[:, None])
    rows = passed.nonzero()[:, 0]
    if len(rows):
        some = mine[rows]
        drop(ranked.rivals, x[rows], some)
        mine[rows] = some


def bars(
    latents: Iterable[int],
    lowest: Iterable[tuple[Feature, float]],
    clamped: frozenset[int] = frozenset(),
) -> torch.Tensor:
    """Return from which activation on each latent matters, [latents] float32.

    A feature's value `sum(weight * f)` exceeds `v` only if one of its `n` positive terms
    exceeds `v / n`; ranks only ever take away.

    Args:
        latents: the watched ones.
        lowest: features with the lowest value that any policy compares them with.
        clamped: latents whose own activation an edit takes off, so that it must be exact.
    """
    out = {latent: torch.inf for latent in latents}
    for feature, value in lowest:
        positive = [term for term in feature.detect if term.weight > 0]
        for term in positive:
            bar = max(value / (len(positive) * term.weight), 0.0) * (1 - ROUNDING)
            out[term.latent] = min(out[term.latent], bar)
    return torch.tensor([0.0 if n in clamped else bar for n, bar in out.items()])
