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
from functools import lru_cache

import torch

from saeguard.features.types import Feature
from saeguard.sae.encoder import Encoder
from saeguard.sae.errors import SaeError
from saeguard.sae.info import SaeInfo
from saeguard.sae.rank import Rivals, drop, read_rivals

ROUNDING = 1e-5
"""By how much, relatively, a bar lies below where real numbers would put it: the rules round."""


@dataclass(frozen=True, slots=True)
class RankedRows:
    """Which columns of a hook fire by rank, and from where on that matters."""

    source: SaeInfo | Encoder
    columns: slice
    """Among the hook's."""
    latents: tuple[int, ...]
    bar: torch.Tensor
    """[latents] float32; +inf for a latent that alone makes no policy hold."""

    @property
    def rivals(self) -> str:
        """Return what tells the competitors of these latents from those of others."""
        source = self.source
        return f"{source.sha256} {source.k}" if isinstance(source, SaeInfo) else str(id(source))


@dataclass(frozen=True, slots=True)
class Ranked:
    """The same on the model's device, with the encoder of everything that competes."""

    rivals: Rivals
    columns: slice
    bar: torch.Tensor
    shown: torch.Tensor
    """[] bool: whether activations show whatever their rank, for the start-up self-test."""


def make_ranked(rows: RankedRows, device: torch.device) -> Ranked:
    """Bring what competes to the device.

    Raises:
        SaeError: the weights are damaged, or the tap runs on a GPU, where which tokens pass would
            have to be asked of the device in every pass.
    """
    if device.type == "cuda":
        raise SaeError(
            "latents of TopK and groupmax SAEs are not ranked on a GPU yet by this version: serve "
            "on a CPU, scan with Transformers, use an SAE with thresholds, or let measured "
            "thresholds stand for ranks, an approximation: `saeguard features calibrate --topk "
            "approximate`"
        )
    rivals = rivals_of(rows.source, rows.latents, device)
    return Ranked(
        rivals=rivals,
        columns=rows.columns,
        bar=rows.bar.to(device),
        shown=torch.zeros((), dtype=torch.bool, device=device),
    )


@lru_cache(maxsize=8)
def rivals_of(source: SaeInfo | Encoder, latents: tuple[int, ...], device: torch.device) -> Rivals:
    """Return what competes, read once a process."""
    return read_rivals(source, latents, device)


def settle(ranked: Ranked, x: torch.Tensor, f: torch.Tensor) -> None:
    """Leave of `f` [rows, watched] what fires, in place.

    Args:
        ranked: which columns, and their rivals.
        x: [rows, d_in] float32.
        f: `z * (z > theta)` on entry, NaN where it cannot be known, which it stays.
    """
    mine = f[:, ranked.columns]
    over = mine > ranked.bar
    if not over.any():  # nearly always, so this comes first and launches little
        mine.mul_(ranked.shown)
        return
    passed = over.any(1)
    mine.mul_((passed | ranked.shown)[:, None])
    rows = (passed & ~ranked.shown).nonzero()[:, 0]
    if len(rows):
        some = mine[rows]
        drop(ranked.rivals, x[rows], some)
        mine[rows] = some


def bars(
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
            bar = max(share, 0.0) * (1 - ROUNDING)
            out[term.latent] = min(out[term.latent], bar)
    return torch.tensor([0.0 if n in exact else bar for n, bar in out.items()])
