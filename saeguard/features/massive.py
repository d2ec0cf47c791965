"""Tokens of massive norm: attention sinks, which are left out everywhere.

In many models the residuals of a text's first token, and of a few others, have a norm that is a
hundred times that of all other tokens: the model parks attention there (Sun et al. 2024, "Massive
Activations in Large Language Models"). Nearly every latent fires on them, so they say nothing about
the text. No token id names them, since any token can stand first. So a bound on the norm at each
layer is measured on the calibration texts and kept in the feature set. Search, calibration, SAE
training, recordings, scans and serving leave out the tokens above it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

MASSIVE = 10.0
"""Norm, in medians of a layer's norms, above which a token is massive."""
SHOWN = 8
"""Positions that a measurement names, those with most massive tokens first."""
NEAR = 0.5
"""Share of the bound; if kept tokens reach it, the bound does not lie in a wide gap."""


@dataclass(frozen=True, slots=True)
class MeasuredNorms:
    """The norms of one layer's residuals on the calibration texts, special tokens left out."""

    median: float
    tokens: int
    massive: int
    """Tokens whose norm lies above the bound."""
    kept_highest: float
    """Highest norm of the tokens that are not massive."""
    lowest: float | None = None
    """Lowest norm of the massive tokens; None if there are none."""
    highest: float | None = None
    positions: Mapping[int, int] | None = None
    """Massive tokens by their position in the text; at most `SHOWN` positions."""

    @property
    def usual_bound(self) -> float:
        """Return the bound that follows from the median."""
        return rounded(MASSIVE * self.median)

    def in_words(self, bound: float) -> str:
        """Return what was found, and what a bound on the norm leaves out, in a sentence."""
        found = f"norms have the median {self.median:g}, tokens above {bound:g} are left out"
        if not self.massive:
            return f"{found}; none of {self.tokens:,} is, the highest norm is {self._kept}"
        positions = self.positions or {}
        at = ", ".join(f"{at} ({n:,})" for at, n in positions.items())
        more = "" if sum(positions.values()) == self.massive else ", ..."
        return (
            f"{found}: {self.massive:,} of {self.tokens:,}, at position {at}{more}, with norms "
            f"from {self.lowest:g} to {self.highest:g}; the highest other norm is {self._kept}"
        )

    def doubt(self, bound: float) -> str:
        """Return why a bound may leave out too few tokens; empty if it lies in a wide gap."""
        if self.kept_highest <= NEAR * bound:
            return ""
        return (
            f"tokens reach the norm {self._kept} and are not left out: if they are attention "
            "sinks, read a layer at which they stand out more, or write a lower max_norm"
        )

    @property
    def _kept(self) -> str:
        return f"{self.kept_highest:g} ({self.kept_highest / max(self.median, 1e-30):.1f} medians)"


NO_BOUND = (
    "no bound on the norm is known, so attention sinks are evaluated like other tokens; `saeguard "
    "features calibrate` measures one"
)


def left_out(bound: float | None, measured: MeasuredNorms | None) -> str:
    """Return what a feature set says of attention sinks at one layer, in a sentence."""
    if bound is None:
        return NO_BOUND
    if measured is None:
        return f"tokens with a norm above {bound:g} are left out, a bound that was not measured"
    return measured.in_words(bound)


def measure_norms(
    norm: np.ndarray, position: np.ndarray, bound: float | None = None
) -> tuple[float, MeasuredNorms]:
    """Return a bound on the norm, and the statistics of the norms on both sides of it.

    Args:
        norm: [tokens] of the residuals at one layer; norms that are not finite are passed over.
        position: [tokens] of each token in its text.
        bound: a bound that a person chose; None for `MASSIVE` medians.

    Raises:
        ValueError: no norm is finite.
    """
    finite = np.isfinite(norm)
    if not finite.any():
        raise ValueError("no token has a finite norm")
    norm, position = norm[finite], position[finite]
    median = rounded(float(np.median(norm)))
    bound = rounded(MASSIVE * median) if bound is None else bound
    massive = is_massive(norm, bound)
    kept_highest = rounded(float(norm[~massive].max(initial=0.0)))
    measured = MeasuredNorms(median, len(norm), int(massive.sum()), kept_highest)
    if massive.any():
        measured = replace(
            measured,
            lowest=rounded(float(norm[massive].min())),
            highest=rounded(float(norm[massive].max())),
            positions=dict(Counter(position[massive].tolist()).most_common(SHOWN)),
        )
    return bound, measured


def chosen_bounds(
    max_norm: Mapping[int, float], norms: Mapping[int, MeasuredNorms]
) -> dict[int, float]:
    """Return the bounds of a feature set that a person wrote, which a new measurement keeps.

    Args:
        max_norm: the bounds by layer.
        norms: what they were measured from; a bound that does not follow from it was written.
    """
    return {
        layer: bound
        for layer, bound in max_norm.items()
        if layer not in norms or bound != norms[layer].usual_bound
    }


def is_massive(norm: np.ndarray, bound: float) -> np.ndarray:
    """Return [tokens] bool: norms above the bound. A norm that is not finite is an error instead.

    Serving computes the same from the tap's norms: see `saeguard.guard.watchlist`.
    """
    out: np.ndarray = np.isfinite(norm) & (norm > bound)
    return out


def norms_as_plain(norms: Mapping[int, MeasuredNorms]) -> dict[int, dict[str, Any]]:
    """Return measured norms by layer as a feature set holds them."""
    return {
        layer: {
            f.name: value
            for f in fields(measured)
            if (value := getattr(measured, f.name)) is not None
        }
        for layer, measured in norms.items()
    }


def rounded(value: float) -> float:
    """Round to four significant digits, so that a feature set is readable."""
    return float(f"{value:.4g}")
