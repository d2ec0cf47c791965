"""Thresholds that replace the ranks of TopK latents, and how well they agree: data, no torch.

`saeguard.features.fit_topk_thresholds` measures them, a feature set holds them, and serving
reads by them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from saeguard.features.schema import MeasuredPart, RatePart


@dataclass(frozen=True, slots=True)
class Rate:
    """A measured rate of tokens."""

    rate: float
    interval: tuple[float, float]
    """Exact 95 % interval, as if tokens were independent."""
    hits: int
    tokens: int


@dataclass(frozen=True, slots=True)
class StandIn:
    """A threshold that replaces one latent's rank, and how well it agrees with the rank."""

    threshold: float
    """Of the pre-activation, compared strictly."""
    precision: Rate
    """Of the tokens above the threshold, those on which the latent fires by rank."""
    recall: Rate
    """Of the tokens on which it fires by rank, those above the threshold."""


@dataclass(frozen=True, slots=True)
class Approximation:
    """Thresholds in place of ranks, measured on texts by `fit_topk_thresholds`."""

    k: int
    sha256: str
    """Digest of the weight file they were measured with."""
    texts_sha256: str
    """Of the token ids that the agreement was measured on, int64, one text after the other."""
    texts: int
    tokens: int
    latents: Mapping[int, StandIn]

    @property
    def in_words(self) -> str:
        """Return a sentence on the approximation and on how well its worst latent agrees."""
        worst = [
            min((getattr(x, name) for x in self.latents.values()), key=lambda rate: rate.rate)
            for name in ("precision", "recall")
        ]
        precision, recall = (
            f"{r.rate:.3g} (95 %: {r.interval[0]:.3g} to {r.interval[1]:.3g})" for r in worst
        )
        return (
            f"approximate: measured thresholds stand for ranks (k = {self.k}); worst of "
            f"{len(self.latents)} latents on {self.tokens:,} tokens: precision {precision}, "
            f"recall {recall}"
        )


def approximation(part: MeasuredPart) -> Approximation:
    """Return the thresholds of a file that replace ranks."""

    def rate(of: RatePart) -> Rate:
        return Rate(of.rate, (of.interval[0], of.interval[1]), of.hits, of.tokens)

    stand_ins = {
        latent: StandIn(x.threshold, rate(x.precision), rate(x.recall))
        for latent, x in part.latents.items()
    }
    return Approximation(part.k, part.sha256, part.texts_sha256, part.texts, part.tokens, stand_ins)


def as_plain(found: Approximation) -> dict[str, Any]:
    """Return it as a file has it."""
    plain = asdict(found)
    for latent in plain["latents"].values():
        for rate in (latent["precision"], latent["recall"]):
            rate["interval"] = list(rate["interval"])
    return plain
