"""Curves and histograms of scores, for the page."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy.stats import rankdata
from sklearn.metrics import roc_curve

from saeguard.evaluation.figures import Detector

POINTS = 160
"""Points of a curve at most; more would not be seen."""
BINS = 40


class Groups(NamedTuple):
    """One policy's scores by group of texts; -inf for texts shorter than a window."""

    positives: np.ndarray
    negatives: np.ndarray
    benign: np.ndarray


def roc_points(
    detector: Detector, label: np.ndarray, points: int = POINTS
) -> list[tuple[float, float]]:
    """Return the ROC curve as pairs of false-positive and true-positive rate.

    Scores of several folds are not comparable, so each is taken as its rank within its fold.

    Args:
        detector: its texts without a score are left out.
        label: [texts] bool.
        points: of the curve, at most.
    """
    scored = ~np.isnan(detector.score)
    score, fold, label = detector.score[scored], detector.fold[scored], label[scored]
    if not label.any() or label.all():
        return []
    rank = np.empty(len(score))
    for f in np.unique(fold):
        here = fold == f
        rank[here] = rankdata(score[here]) / here.sum()
    false, true, _ = roc_curve(label, rank)
    kept = np.unique(np.linspace(0, len(false) - 1, points).astype(int))
    return [(float(false[i]), float(true[i])) for i in kept]


def score_range(groups: Groups) -> tuple[float, float]:
    """Return the range of scores that is drawn: nearly all of them, and the threshold 1."""
    every = np.concatenate(groups)
    every = every[np.isfinite(every)]
    if not len(every):
        return 0.0, 1.5
    low, high = np.quantile(every, [0.005, 0.995])
    room = 0.05 * max(float(high - low), 0.1)
    return min(float(low) - room, 0.9), max(float(high) + room, 1.1)


def histogram(scores: np.ndarray, low: float, high: float) -> list[float]:
    """Return the share of texts in each of `BINS` bins; those outside are in the outermost."""
    inside = np.clip(scores, low, high)
    counts, _ = np.histogram(inside, BINS, (low, high))
    return [float(count) for count in counts / max(len(scores), 1)]


def firing(scores: np.ndarray, low: float, high: float) -> list[tuple[float, float]]:
    """Return the share of texts above each of many thresholds, as pairs of threshold and share."""
    if not len(scores):
        return []
    at = np.linspace(low, high, POINTS)
    above = 1 - np.searchsorted(np.sort(scores), at, side="right") / len(scores)
    end = int((above > 0).sum()) + 1  # with the first threshold that no text exceeds
    return [(float(x), float(y)) for x, y in zip(at[:end], above[:end], strict=True)]
