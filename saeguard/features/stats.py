"""Detection statistics with intervals that respect near copies."""

from __future__ import annotations

import numpy as np
from scipy.stats import beta, rankdata

RESAMPLES = 2000
LEVEL = 0.95


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
    """Return a 95 % percentile bootstrap interval of the AUROC, resampling whole clusters.

    Texts of one template are near copies: resampling single texts would feign certainty
    (Field and Welsh 2007, Bootstrapping clustered data).

    Args:
        scores: [texts].
        label: [texts] bool.
        cluster: [texts] name of each text's cluster.
        seed: of the resampling.
    """
    _, member = np.unique(cluster, return_inverse=True)
    count = int(member.max()) + 1
    rng = np.random.default_rng(seed)
    drawn = rng.multinomial(count, np.full(count, 1 / count), RESAMPLES)  # [resamples, clusters]
    weight = drawn[:, member].astype(np.float64)
    above, below = scores[label][:, None], scores[~label][None, :]
    wins = (above > below) + 0.5 * (above == below)
    for_positive, for_negative = weight[:, label], weight[:, ~label]
    pairs = for_positive.sum(1) * for_negative.sum(1)
    won = np.einsum("rn,rn->r", for_positive @ wins, for_negative)
    areas = won[pairs > 0] / pairs[pairs > 0]
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(areas, [tail, 1 - tail])
    return float(low), float(high)


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
