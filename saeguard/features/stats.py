"""Detection statistics with intervals that respect near copies."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from scipy.stats import beta, rankdata

RESAMPLES = 2000
LEVEL = 0.95
BLOCK = 100
"""Bootstrap samples that are computed at a time."""


def auroc(scores: np.ndarray, label: np.ndarray) -> np.ndarray:
    """Return the area under the ROC curve, ties counted half (Mann and Whitney 1947).

    Args:
        scores: [texts] or [texts, columns].
        label: [texts] bool.

    Returns:
        [] or [columns] float64.
    """
    positives, negatives = int(label.sum()), int((~label).sum())
    ranks = rankdata(scores, axis=0)
    out: np.ndarray = (ranks[label].sum(0) - positives * (positives + 1) / 2) / (
        positives * negatives
    )
    return out


def auroc_interval(
    scores: np.ndarray, label: np.ndarray, cluster: np.ndarray, seed: int
) -> tuple[float, float]:
    """Return a 95 % percentile bootstrap interval of the AUROC; see `resampled_aurocs`."""
    areas = resampled_aurocs(scores, label, cluster, seed)
    return percentiles(areas[np.isfinite(areas)])


def percentiles(resampled: np.ndarray) -> tuple[float, float]:
    """Return the 95 % interval of resampled values."""
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(resampled, [tail, 1 - tail])
    return float(low), float(high)


def resampled_aurocs(
    scores: np.ndarray, label: np.ndarray, cluster: np.ndarray, seed: int
) -> np.ndarray:
    """Return the AUROCs of bootstrap samples of whole clusters.

    Texts of one template are near copies: resampling single texts would feign certainty
    (Field and Welsh 2007, Bootstrapping clustered data). Memory is `BLOCK` times the texts.

    Args:
        scores: [texts].
        label: [texts] bool.
        cluster: [texts] name of each text's cluster.
        seed: of the resampling.

    Returns:
        [RESAMPLES] float64, NaN for a sample without one of the labels.
    """
    _, member = np.unique(cluster, return_inverse=True)
    order = np.argsort(scores, kind="stable")
    member, positive, ordered = member[order], label[order], scores[order]
    # Of equal scores. Not by their difference, since scores may be -inf.
    starts = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))
    areas = [
        _areas(weight[:, member], positive, starts)
        for weight in resamples(int(member.max()) + 1, seed)
    ]
    return np.concatenate(areas)


def resamples(count: int, seed: int) -> Iterator[np.ndarray]:
    """Yield how often each of `count` clusters is drawn, [BLOCK, count] at a time."""
    rng = np.random.default_rng(seed)
    for start in range(0, RESAMPLES, BLOCK):
        size = min(BLOCK, RESAMPLES - start)
        yield rng.multinomial(count, np.full(count, 1 / count), size)


def _areas(weight: np.ndarray, positive: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Return the AUROC of each row of weights; texts are in ascending order of score."""
    for_positive = np.add.reduceat(np.where(positive, weight, 0), starts, axis=1).astype(float)
    for_negative = np.add.reduceat(np.where(positive, 0, weight), starts, axis=1).astype(float)
    below = for_negative.cumsum(1) - for_negative / 2  # ties count half
    pairs = for_positive.sum(1) * for_negative.sum(1)
    won = (for_positive * below).sum(1)
    out = np.full(len(won), np.nan)
    np.divide(won, pairs, out=out, where=pairs > 0)
    return out


def interval(hits: int, trials: int) -> tuple[float, float]:
    """Return the exact 95 % interval of a rate (Clopper and Pearson 1934)."""
    tail = (1 - LEVEL) / 2
    low = float(beta.ppf(tail, hits, trials - hits + 1)) if hits else 0.0
    high = float(beta.ppf(1 - tail, hits + 1, trials - hits)) if hits < trials else 1.0
    return low, high


def rate(hits: int, trials: int) -> dict[str, float | int | list[float]]:
    """Return a rate with its exact 95 % interval, for the evidence."""
    low, high = interval(hits, trials)
    return {
        "rate": round(hits / trials, 4),
        "interval": [round(low, 4), round(high, 4)],
        "hits": hits,
        "texts": trials,
    }
