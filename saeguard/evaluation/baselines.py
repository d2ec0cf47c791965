"""What a policy must beat: length alone, a bag of words, and a probe on the same residual.

What is fitted is fitted on other templates than those it scores: five folds cut by template, each
scored by the model of the other four (scikit-learn's GroupKFold).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from saeguard.evaluation.datasets import Dataset, Part, lines_at, spelt
from saeguard.evaluation.figures import Detector, Sort
from saeguard.features.stats import auroc

FOLDS = 5
MOST = 20_000
"""Texts of a dataset that baselines are fitted on at most."""
ORDINARY = 5_000
"""Ordinary texts that baselines score at most."""
WORD = r"\w+|[^\w\s]"
STRENGTHS = (0.001, 0.01, 0.1, 1.0)
"""Inverse L2 penalties of the probe, on standardised residuals; chosen within each fold."""
POOLED = ("mean token", "last token")
"""The rows of a pooled residual."""

Fitted: TypeAlias = Callable[[Any], np.ndarray]
"""Scores inputs."""


def spread(count: int, most: int = MOST) -> np.ndarray:
    """Return a mask [count] of at most `most` texts, evenly spread."""
    out = np.zeros(count, bool)
    out[np.linspace(0, count - 1, min(count, most)).astype(int)] = True
    return out


def length(dataset: Dataset, part: Part, benign: np.ndarray) -> Detector:
    """Score texts by their length in characters: a floor below 0.5 says that positives are short.

    Args:
        dataset: to be scored.
        part: whose length counts; texts without it are not scored.
        benign: [texts] characters of the same part of ordinary texts.
    """
    size = dataset.length(part).astype(np.float64)
    size[size == 0] = np.nan
    ordinary = benign[benign > 0].astype(np.float64)
    none = np.zeros(len(dataset), np.int64)
    return Detector("length", "length", part, size, (ordinary,), none)


def words(dataset: Dataset, part: Part, benign: Sequence[str]) -> Detector | str:
    """Score texts by their words and punctuation marks: TF-IDF, logistic regression, C = 10.

    Returns the detector, or why there is none.
    """
    texts = {i: spelt(line, part) for i, _, line in lines_at(dataset, spread(len(dataset)))}
    have = np.array([bool(texts.get(i)) for i in range(len(dataset))])

    def fit(train: np.ndarray, label: np.ndarray, _template: np.ndarray) -> Fitted:
        model = make_pipeline(
            TfidfVectorizer(token_pattern=WORD), LogisticRegression(C=10, max_iter=2000)
        )
        model.fit([texts[i] for i in train], label)
        return lambda some: np.asarray(model.decision_function(some))

    ordinary = [text for text in benign if text]
    return _cross_fitted(
        "words", "words", dataset, part, have, fit, lambda at: [texts[i] for i in at], ordinary
    )


def probe(
    dataset: Dataset, part: Part, layer: int, row: int, x: np.ndarray, benign: np.ndarray
) -> Detector | str:
    """Score texts by a logistic regression on the residual, without any SAE.

    The strength of its penalty is chosen within each fold, on templates of the other four.

    Args:
        dataset: to be scored.
        part: of the text that was pooled.
        layer: whose output was.
        row: of `POOLED`.
        x: [texts, d] pooled residuals, NaN for texts without any.
        benign: [texts, d] of ordinary texts.

    Returns:
        The detector, or why there is none.
    """

    def fit(train: np.ndarray, label: np.ndarray, template: np.ndarray) -> Fitted:
        model = _probe(x[train], label, _strength(x[train], label, template))
        return lambda some: np.asarray(model.decision_function(some))

    have = ~np.isnan(x).any(1) & spread(len(dataset))
    name = f"probe, {POOLED[row]}, layer {layer}"
    return _cross_fitted(name, "probe", dataset, part, have, fit, lambda at: x[at], benign)


def _probe(x: np.ndarray, label: np.ndarray, strength: float) -> Any:
    model = make_pipeline(
        StandardScaler(), LogisticRegression(C=strength, class_weight="balanced", max_iter=2000)
    )
    return model.fit(x, label)


def _strength(x: np.ndarray, label: np.ndarray, template: np.ndarray) -> float:
    areas = np.zeros(len(STRENGTHS))
    for train, held in _folds(label, template, 3):
        for i, strength in enumerate(STRENGTHS):
            scores = _probe(x[train], label[train], strength).decision_function(x[held])
            areas[i] += auroc(scores, label[held])
    return STRENGTHS[int(np.argmax(areas))]


def _cross_fitted(
    name: str,
    sort: Sort,
    dataset: Dataset,
    part: Part,
    have: np.ndarray,
    fit: Callable[[np.ndarray, np.ndarray, np.ndarray], Fitted],
    inputs: Callable[[np.ndarray], Any],
    benign: Any,
) -> Detector | str:
    """Return out-of-fold scores of the texts at which `have` [texts] is true, or why not."""
    at = np.flatnonzero(have)
    if not len(at):
        return f"no text has a part to read: {part}"
    label, template = dataset.label[at], dataset.template[at]
    score = np.full(len(dataset), np.nan)
    fold = np.zeros(len(dataset), np.int64)
    ordinary = []
    for f, (train, held) in enumerate(_folds(label, template, FOLDS)):
        model = fit(at[train], label[train], template[train])
        score[at[held]], fold[at[held]] = model(inputs(at[held])), f
        ordinary.append(model(benign) if len(benign) else np.empty(0))
    if not ordinary:
        return "no fold has both labels on both sides: too few templates"
    return Detector(name, sort, part, score, tuple(ordinary), fold)


def _folds(
    label: np.ndarray, template: np.ndarray, count: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield indices to fit on and to score, cut by template; both labels are in both."""
    splits = min(count, len(np.unique(template)))
    if splits < 2:  # noqa: PLR2004 - nothing to hold out
        return
    for train, held in GroupKFold(splits).split(label, groups=template):
        if all(label[some].any() and not label[some].all() for some in (train, held)):
            yield train, held
