"""Weighted groups of latents: few, with positive weights, so that a rule can be read."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from scipy.optimize import minimize
from sklearn.model_selection import GroupKFold

from saeguard.features.corpus import Corpus, peaks
from saeguard.features.stats import auroc

CANDIDATES = 128
FOLDS = 4
PENALTY = 0.01
"""Of the weights' sum, on peaks scaled to 1; it drives redundant latents to zero."""


def folds(corpus: Corpus) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield `(train, validation)` masks [texts] that share no template; both hold both labels."""
    splits = min(FOLDS, len(np.unique(corpus.template)))
    if splits < 2:  # noqa: PLR2004 - one template cannot be split
        return
    for train, held in GroupKFold(splits).split(corpus.label, groups=corpus.template):
        mask = np.zeros(len(corpus), bool)
        mask[train] = True
        if 0 < corpus.label[train].mean() < 1 and 0 < corpus.label[held].mean() < 1:
            yield mask, ~mask


def candidates(peak: np.ndarray, label: np.ndarray, count: int = CANDIDATES) -> np.ndarray:
    """Return the latents of the highest AUROC, best first; never-firing ones are left out.

    Args:
        peak: [texts, latents] largest activation in each text.
        label: [texts] bool.
        count: how many.
    """
    fires = np.flatnonzero((peak[label] > 0).any(0))
    areas = auroc(peak[:, fires], label)
    # Stable, so that ties fall to the lower number on every machine.
    out: np.ndarray = fires[np.argsort(-areas, kind="stable")[:count]]
    return out


def fit_weights(peak: np.ndarray, label: np.ndarray, size: int) -> np.ndarray:
    """Return weights [latents] >= 0, at most `size` of them above zero.

    Logistic regression on the peaks with an L1 penalty and balanced classes; the largest
    weights are kept and fitted again. A sum of peaks replaces the peak of the sum, which
    is what detection reads and validation measures.

    Args:
        peak: [texts, latents].
        label: [texts] bool.
        size: bound on the latents with weight.
    """
    scale = np.maximum(np.quantile(peak[label], 0.99, axis=0), 1e-6)
    scaled = peak / scale
    weights = _logistic(scaled, label, PENALTY)
    kept = np.argsort(-weights, kind="stable")[:size]
    out = np.zeros(peak.shape[1])
    out[kept] = _logistic(scaled[:, kept], label, PENALTY / 10) / scale[kept]
    if not out.any():
        out[0] = 1 / scale[0]
    normed: np.ndarray = out / out.max()
    return normed


def choose_size(corpus: Corpus, f: np.ndarray, peak: np.ndarray, largest: int) -> tuple[int, float]:
    """Return the group size that does best on templates left out of the fit, and its AUROC.

    Of equal sizes the smaller wins.

    Args:
        corpus: the search split.
        f: [T, latents] activations of the candidates.
        peak: [texts, latents] their peaks.
        largest: bound on the size.
    """
    sizes = [size for size in (1, 2, 4, 8, 16, 32) if size < largest] + [largest]
    areas = np.zeros(len(sizes))
    splits = list(folds(corpus))
    for train, held in splits:
        for i, size in enumerate(sizes):
            weights = fit_weights(peak[train], corpus.label[train], size)
            score = peaks(corpus, f @ weights.astype(np.float32))
            areas[i] += auroc(score[held], corpus.label[held])
    best = int(np.argmax(np.round(areas, 6)))
    return sizes[best], float(areas[best]) / max(len(splits), 1)


def _logistic(x: np.ndarray, label: np.ndarray, penalty: float) -> np.ndarray:
    """Fit nonnegative weights and a free bias by L-BFGS-B; return the weights."""
    sign = np.where(label, 1.0, -1.0)
    importance = np.where(label, 0.5 / label.sum(), 0.5 / (~label).sum())

    def loss(theta: np.ndarray) -> tuple[float, np.ndarray]:
        margin = sign * (x @ theta[:-1] + theta[-1])
        slope = -importance * sign / (1 + np.exp(np.clip(margin, -50, 50)))
        gradient = np.append(x.T @ slope + penalty, slope.sum())
        value = importance @ np.logaddexp(0, -margin) + penalty * theta[:-1].sum()
        return float(value), gradient

    columns = x.shape[1]
    bounds = [(0.0, None)] * columns + [(None, None)]
    fitted = minimize(loss, np.zeros(columns + 1), jac=True, method="L-BFGS-B", bounds=bounds)
    out: np.ndarray = fitted.x[:-1]
    return out
