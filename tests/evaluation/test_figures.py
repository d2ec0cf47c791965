"""Figures agree with scikit-learn and SciPy, and a missing one is None, never zero."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy.stats import binomtest
from sklearn.metrics import roc_auc_score, roc_curve

from saeguard.evaluation.curves import firing, histogram, roc_points
from saeguard.evaluation.datasets import Dataset
from saeguard.evaluation.figures import (
    Detector,
    area,
    at_benign_rate,
    benign_threshold,
    by_kind,
    measure,
    pair_accuracy,
    share,
)

RNG = np.random.default_rng(5)


def dataset(label: np.ndarray, template: np.ndarray, kind: np.ndarray | None = None) -> Dataset:
    """Return a dataset of these labels."""
    n = len(label)
    return Dataset(
        "set",
        Path("set.jsonl"),
        "noise",
        "",
        tuple(map(str, range(n))),
        label,
        np.full(n, "") if kind is None else kind,
        template,
        tuple(bytes([i]) for i in range(n)),
        np.ones((n, 2), np.int64),
    )


def detector(score: np.ndarray, benign: np.ndarray | None = None) -> Detector:
    """Return a policy's scores; it matches above 1."""
    ordinary = np.empty(0) if benign is None else benign
    folds = np.zeros(len(score), np.int64)
    return Detector("p", "policy", "output", score, (ordinary,), folds, score > 1)


def test_area_equals_sklearn() -> None:
    """In one fold it is the AUROC, in several the mean of theirs; the interval holds it."""
    label = RNG.random(120) < 0.4
    score = np.round(label + RNG.standard_normal(120), 1)
    template, fold = np.arange(120) // 4, np.arange(120) % 3
    whole = area(score, label, template, np.zeros(120, int), 0)
    assert whole is not None
    assert whole["value"] == pytest.approx(roc_auc_score(label, score))
    assert whole["interval"][0] < whole["value"] < whole["interval"][1]
    mean = np.mean([roc_auc_score(label[fold == f], score[fold == f]) for f in range(3)])
    folded = area(score + 100 * fold, label, template, fold, 0)
    assert folded is not None
    assert folded["value"] == pytest.approx(mean)
    assert folded["interval"][0] < folded["value"] < folded["interval"][1]


def test_scores_below_every_other() -> None:
    """A text too short for its window ties with others of its sort, below all scores."""
    label = np.array([True, True, False, False])
    score = np.array([0.5, -np.inf, -np.inf, 0.2])
    found = area(score, label, np.arange(4), np.zeros(4, int), 0)
    assert found is not None
    assert found["value"] == pytest.approx(roc_auc_score(label, [0.5, -9, -9, 0.2]))


def test_one_label_gives_no_area() -> None:
    """There is nothing to rank."""
    label, score = np.ones(5, bool), np.arange(5.0)
    assert area(score, label, np.arange(5), np.zeros(5, int), 0) is None
    assert pair_accuracy(score, label, np.zeros(5), 0) is None
    figures = measure(detector(score), dataset(label, np.arange(5)), 0)
    assert figures["auroc"] is None
    assert figures["fpr"] is None
    assert figures["tpr"]["value"] == 3 / 5


def test_pairs_are_averaged_over_templates() -> None:
    """A template with many texts counts as much as one with two; ties count half."""
    template = np.array(["a", "a", "b", "b", "b", "b", "c"])
    label = np.array([True, False, True, True, False, False, True])
    score = np.array([2.0, 1.0, 1.0, 3.0, 2.0, 1.0, 0.0])
    found = pair_accuracy(score, label, template, 0)
    assert found is not None
    assert found["value"] == pytest.approx((1 + (0 + 0.5 + 1 + 1) / 4) / 2)
    assert found["templates"] == 2


def test_rates_are_clopper_pearson() -> None:
    """As SciPy's exact interval; without trials there is no rate."""
    exact = binomtest(3, 40).proportion_ci(method="exact")
    found = share(3, 40)
    assert found is not None
    assert found["interval"] == pytest.approx([exact.low, exact.high])
    assert share(0, 0) is None


def test_benign_threshold_equals_sklearn() -> None:
    """It catches what the ROC curve of positives beside ordinary texts gives at that rate."""
    benign, positive = RNG.standard_normal(1000), RNG.standard_normal(300) + 1
    label = np.repeat([False, True], [1000, 300])
    false, true, _ = roc_curve(label, np.concatenate([benign, positive]), drop_intermediate=False)
    for rate in (0.01, 0.001):
        found = at_benign_rate(positive, np.zeros(300, int), [benign], rate)
        assert found is not None
        assert found["value"] == pytest.approx(true[false <= rate].max())
        assert (benign > found["threshold"]).mean() <= rate


def test_too_few_ordinary_texts_give_no_threshold() -> None:
    """With 999 texts, 0.1 % is less than one of them."""
    assert benign_threshold(np.arange(999.0), 0.001) is None
    assert benign_threshold(np.arange(1000.0), 0.001) == 998
    assert at_benign_rate(np.ones(3), np.zeros(3, int), [np.arange(99.0)], 0.01) is None


def test_texts_without_verdict_count_in_no_figure() -> None:
    """They are no negatives: only `scored` tells of them."""
    label = np.array([True, True, True, False, False])
    score = np.array([2.0, 0.5, np.nan, 0.1, np.nan])
    figures = measure(detector(score), dataset(label, np.arange(5)), 0)
    assert figures["scored"] == {"positives": 2, "negatives": 1}
    assert figures["tpr"]["value"] == 1 / 2
    assert figures["auroc"]["value"] == 1.0


def test_kinds_are_compared_with_their_own_negatives() -> None:
    """Or with all of them, if a kind has few, and says so."""
    label = np.tile([True, False], 20)
    kind = np.repeat(["a", "b"], [20, 20])
    kind[~label & (kind == "b")] = "c"
    score = RNG.standard_normal(40) + label
    a, b = by_kind(detector(score), dataset(label, np.arange(40), kind), 0)
    mine = kind == "a"
    assert (a["kind"], a["against"]) == ("a", "negatives of the kind")
    assert a["auroc"]["value"] == pytest.approx(roc_auc_score(label[mine], score[mine]))
    every = (label & (kind == "b")) | ~label
    assert (b["against"], b["negatives"]) == ("all negatives", 20)
    assert b["auroc"]["value"] == pytest.approx(roc_auc_score(label[every], score[every]))


def test_curves() -> None:
    """The ROC curve has the area of the AUROC; the other curves are shares of texts."""
    label = RNG.random(80) < 0.5
    score = label + RNG.standard_normal(80)
    points = np.array(roc_points(detector(score), label))
    assert np.trapezoid(points[:, 1], points[:, 0]) == pytest.approx(roc_auc_score(label, score))
    assert sum(histogram(score, -1.0, 1.0)) == pytest.approx(1)
    at, above = np.array(firing(score, -5.0, 5.0)).T
    assert above[np.searchsorted(at, 0) - 1] == pytest.approx(
        (score > at[np.searchsorted(at, 0) - 1]).mean()
    )
