"""Compare a measure between two arms, with bootstrap intervals over whole templates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from saeguard.features.stats import percentiles, resamples

How = Literal["ratio", "difference"]


@dataclass(frozen=True, slots=True)
class Units:
    """A measure's value as a quotient of two sums: findings per answer, loss per token."""

    numerator: np.ndarray
    """[units]"""
    denominator: np.ndarray
    """[units]"""
    template: tuple[str, ...]
    """[units]"""

    @property
    def value(self) -> float:
        """Sum of the numerators over that of the denominators; NaN if that is 0."""
        bottom = float(self.denominator.sum())
        return float(self.numerator.sum()) / bottom if bottom else float("nan")


@dataclass(frozen=True, slots=True)
class Change:
    """How an arm differs from another."""

    value: float
    low: float
    high: float


def units(
    numerator: Sequence[float], template: Sequence[str], denominator: Sequence[float] | None = None
) -> Units:
    """Return a measure; without a denominator, each unit counts 1."""
    bottom = np.ones(len(numerator)) if denominator is None else np.array(denominator, float)
    return Units(np.array(numerator, float), bottom, tuple(template))


def pooled(parts: Sequence[Units]) -> Units:
    """Return the measure over the units of several arms."""
    return Units(
        np.concatenate([p.numerator for p in parts]),
        np.concatenate([p.denominator for p in parts]),
        tuple(t for p in parts for t in p.template),
    )


def interval(measured: Units, seed: int) -> tuple[float, float]:
    """Return a 95 % percentile bootstrap interval of a measure's value."""
    names = sorted(set(measured.template))
    drawn = _quotients(measured, names, seed)
    return percentiles(drawn[np.isfinite(drawn)]) if np.isfinite(drawn).any() else (np.nan, np.nan)


def compare(off: Units, on: Units, how: How, seed: int) -> Change:
    """Return the change from `off` to `on`, with a 95 % percentile bootstrap interval.

    Templates are resampled whole, with their units of both arms: the arms share their prompts, so
    what varies from prompt to prompt cancels out (Efron and Tibshirani 1993, chapter 8).

    Args:
        off: without the clamp.
        on: with it; units of the same templates, of one arm or of several.
        how: ratio: `on / off - 1`. difference: `on - off`.
        seed: of the resampling.

    Returns:
        NaN where `off` is 0 and the change is a ratio.
    """
    names = sorted({*off.template, *on.template})
    before, after = _quotients(off, names, seed), _quotients(on, names, seed)
    drawn = _change(before, after, how)
    drawn = drawn[np.isfinite(drawn)]
    value = _change(np.array([off.value]), np.array([on.value]), how)[0]
    low, high = percentiles(drawn) if len(drawn) else (float("nan"), float("nan"))
    return Change(float(value), low, high)


def _change(before: np.ndarray, after: np.ndarray, how: How) -> np.ndarray:
    if how == "difference":
        out: np.ndarray = after - before
        return out
    out = np.full(before.shape, np.nan)
    np.divide(after, before, out=out, where=before != 0)
    out -= 1
    return out


def _quotients(measured: Units, names: Sequence[str], seed: int) -> np.ndarray:
    """Return the measure's value in each resample of the templates `names`."""
    at = {name: i for i, name in enumerate(names)}
    member = np.array([at[t] for t in measured.template])
    top = np.bincount(member, measured.numerator, len(names))
    bottom = np.bincount(member, measured.denominator, len(names))
    parts = []
    for weight in resamples(len(names), seed):
        below = weight @ bottom
        out = np.full(len(below), np.nan)
        np.divide(weight @ top, below, out=out, where=below != 0)
        parts.append(out)
    return np.concatenate(parts)
