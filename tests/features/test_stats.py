"""Areas and intervals agree with scikit-learn, SciPy and simulation."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binomtest
from sklearn.metrics import roc_auc_score

from saeguard.features.stats import auroc, auroc_interval, rate


def test_auroc_equals_sklearn() -> None:
    """With ties, for one column and for many."""
    rng = np.random.default_rng(0)
    label = rng.random(90) < 0.4
    scores = rng.integers(0, 8, (90, 5)).astype(float)
    expected = [roc_auc_score(label, column) for column in scores.T]
    np.testing.assert_allclose(auroc(scores, label), expected)
    np.testing.assert_allclose(auroc(scores[:, 0], label), expected[0])


def test_interval_covers_and_is_wider_for_clusters() -> None:
    """Copies of a text do not make the interval narrower."""
    rng = np.random.default_rng(1)
    label = np.arange(60) % 2 == 0
    scores = label + rng.standard_normal(60)
    names = np.arange(60)
    once = auroc_interval(scores, label, names, seed=0)
    copied = [np.repeat(x, 5) for x in (scores, label, names)]
    apart = auroc_interval(copied[0], copied[1], np.arange(300), seed=0)
    together = auroc_interval(*copied, seed=0)
    area = float(auroc(scores, label))
    assert once[0] < area < once[1]
    assert together == pytest.approx(once, abs=0.02)
    assert apart[1] - apart[0] < 0.6 * (once[1] - once[0])


def test_interval_is_deterministic() -> None:
    """One seed gives one interval."""
    rng = np.random.default_rng(2)
    scores, label = rng.random(40), np.arange(40) % 2 == 0
    first = auroc_interval(scores, label, np.arange(40) // 4, seed=3)
    assert first == auroc_interval(scores, label, np.arange(40) // 4, seed=3)


@pytest.mark.parametrize(("hits", "trials"), [(0, 100), (1, 100), (37, 100), (100, 100)])
def test_rate_is_clopper_pearson(hits: int, trials: int) -> None:
    """The exact interval, also at its ends."""
    exact = binomtest(hits, trials).proportion_ci(method="exact")
    measured = rate(hits, trials)
    assert measured["interval"] == [round(exact.low, 4), round(exact.high, 4)]
    assert measured["rate"] == hits / trials
