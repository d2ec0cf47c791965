"""Shares and changes with their uncertainty."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

Interval = tuple[float, float]
RESAMPLES = 4000
Z95 = 1.959963984540054


def wilson(hits: int, trials: int) -> Interval:
    """Return the 95 % score interval of a share (Wilson 1927)."""
    if not trials:
        return 0.0, 1.0
    share, z2 = hits / trials, Z95 * Z95
    middle = (share + z2 / (2 * trials)) / (1 + z2 / trials)
    spread = math.sqrt(share * (1 - share) / trials + z2 / (4 * trials * trials))
    half = Z95 * spread / (1 + z2 / trials)
    return max(0.0, middle - half), min(1.0, middle + half)


def change(
    off: Sequence[float], on: Sequence[float], cluster: Sequence[str], seed: int
) -> tuple[float, Interval]:
    """Return `sum(on) / sum(off) - 1` with a 95 % percentile bootstrap interval.

    Whole clusters are resampled, with both arms of each: completions of one prompt are alike,
    and the arms share their prompts.

    Args:
        off: value of each unit without the change.
        on: value of the same units with it.
        cluster: what each unit belongs to.
        seed: of the resampling.

    Raises:
        ValueError: `off` sums to zero, and there is nothing to compare with.
    """
    names, member = np.unique(np.asarray(cluster), return_inverse=True)
    sums = np.stack([np.bincount(member, np.asarray(x, float), len(names)) for x in (off, on)])
    if not sums[0].sum():
        raise ValueError("the arm without the change sums to zero")
    draws = np.random.default_rng(seed).multinomial(
        len(names), np.full(len(names), 1 / len(names)), RESAMPLES
    )
    before, after = draws @ sums[0], draws @ sums[1]
    changes = after[before > 0] / before[before > 0] - 1
    low, high = np.quantile(changes, [0.025, 0.975])
    return float(sums[1].sum() / sums[0].sum() - 1), (float(low), float(high))
