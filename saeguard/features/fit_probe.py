"""Fit a linear probe: its largest logit over a text separates texts that show a behaviour."""

from __future__ import annotations

from itertools import product

import numpy as np
from sklearn.linear_model import LogisticRegression

from saeguard.features.corpus import Corpus, peaks
from saeguard.features.latent_groups import folds
from saeguard.features.probe import Probe
from saeguard.features.stats import auroc

RECIPES = ("mean", "tokens", "peak")
"""What a text is in training: the mean of its tokens, each of them, or its strongest one."""
STRENGTHS = (0.001, 0.01, 0.1)
"""Inverse L2 penalties, on standardised residuals."""
MOST_TOKENS = 8000
ROUNDS = 3
"""Of picking each text's strongest token and fitting again, as in multiple-instance learning."""


def fit_probe(corpus: Corpus, seed: int) -> tuple[Probe, float]:
    """Fit a probe by the recipe that does best on templates left out of the fit.

    Returns the probe, fitted on all of `corpus`, and that recipe's AUROC on the templates left out.

    Args:
        corpus: the search split; nothing else may choose the recipe.
        seed: of the choice of tokens, if there are too many.
    """
    options = list(product(RECIPES, STRENGTHS))
    areas = np.zeros(len(options))
    splits = list(folds(corpus))
    for train, held in splits:
        part, rest = corpus.select(train), corpus.select(held)
        for i, (recipe, strength) in enumerate(options):
            probe = _fit(part, recipe, strength, seed)
            areas[i] += auroc(peaks(rest, probe.logits(rest.by_layer)), rest.label)
    best = int(np.argmax(np.round(areas, 6)))
    return _fit(corpus, *options[best], seed), float(areas[best]) / max(len(splits), 1)


def _fit(corpus: Corpus, recipe: str, strength: float, seed: int) -> Probe:
    looked = corpus.looked
    x = corpus.x.numpy()[looked]
    owner = corpus.owner[looked]
    center, spread = x.mean(0), x.std(0) + 1e-6
    x = (x - center) / spread
    starts = np.flatnonzero(np.diff(owner, prepend=-1))
    means = np.add.reduceat(x, starts, axis=0) / np.diff([*starts, len(x)])[:, None]
    if recipe == "tokens":
        rng = np.random.default_rng(seed)
        drawn = rng.permutation(len(x))[:MOST_TOKENS]
        w, b = _logistic(x[drawn], corpus.label[owner[drawn]], strength)
    else:
        w, b = _logistic(means, corpus.label, strength)
    for _ in range(ROUNDS if recipe == "peak" else 0):
        # Within a text the first of its tokens in descending order of logit is its peak.
        order = np.lexsort((-(x @ w), owner))
        w, b = _logistic(x[order[starts]], corpus.label, strength)
    w = w / spread
    return Probe(
        corpus.layers,
        w.astype(np.float32).reshape(len(corpus.layers), -1),
        float(b - center @ w),
        f"logistic regression on {recipe}, C={strength}",
    )


def _logistic(x: np.ndarray, label: np.ndarray, strength: float) -> tuple[np.ndarray, float]:
    model = LogisticRegression(
        C=strength, class_weight="balanced", solver="newton-cholesky", max_iter=100
    )
    model.fit(x, label)
    return model.coef_[0], float(model.intercept_[0])
