"""The figures of one detector on one dataset, with intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np

from saeguard.evaluation.datasets import Dataset, Part
from saeguard.features.stats import auroc, interval, percentiles, resampled_aurocs, resamples

Sort: TypeAlias = Literal["policy", "length", "words", "probe", "judge"]

BENIGN_RATES = (0.01, 0.001)
"""Shares of ordinary texts at which the share of positives caught is reported."""
FEW = 5
"""Least number of texts of each label for an AUROC within one kind."""


@dataclass(frozen=True, slots=True)
class Detector:
    """One detector's scores on one dataset."""

    name: str
    sort: Sort
    part: Part
    score: np.ndarray
    """[texts] float64; NaN: the text was not scored. -inf is below every score."""
    benign: tuple[np.ndarray, ...]
    """By fold, [texts] scores of ordinary texts by the model that scored the fold, without NaN."""
    fold: np.ndarray
    """[texts] int: by which of several fitted models a text was scored; 0 without any fit."""
    match: np.ndarray | None = None
    """[texts] bool, of a policy."""
    note: str = ""


def measure(detector: Detector, dataset: Dataset, seed: int) -> dict[str, Any]:
    """Return a detector's figures on a dataset, as the report has them.

    Texts without score count in no figure; `scored` counts the others.
    """
    scored = ~np.isnan(detector.score)
    score, fold = detector.score[scored], detector.fold[scored]
    label, template = dataset.label[scored], dataset.template[scored]
    out: dict[str, Any] = {
        "scored": {"positives": int(label.sum()), "negatives": int((~label).sum())},
        "auroc": area(score, label, template, fold, seed),
        "pairs": pair_accuracy(score, label, template, seed),
        "tpr": None,
        "fpr": None,
        "at_benign": {
            str(rate): at_benign_rate(score[label], fold[label], detector.benign, rate)
            for rate in BENIGN_RATES
        },
    }
    if detector.match is not None:
        match = detector.match[scored]
        out["tpr"] = share(int(match[label].sum()), int(label.sum()))
        out["fpr"] = share(int(match[~label].sum()), int((~label).sum()))
    return out


def area(
    score: np.ndarray, label: np.ndarray, template: np.ndarray, fold: np.ndarray, seed: int
) -> dict[str, Any] | None:
    """Return the AUROC, its mean over folds if there are several, and its interval.

    The interval resamples whole templates within each fold. None without texts of both labels.
    """
    areas, resampled = [], []
    for f in np.unique(fold):
        here = fold == f
        if label[here].any() and not label[here].all():
            areas.append(float(auroc(score[here], label[here])))
            resampled.append(resampled_aurocs(score[here], label[here], template[here], seed + f))
    if not areas:
        return None
    stacked = np.array(resampled)
    known = stacked[:, np.isfinite(stacked).any(0)]
    return {
        "value": float(np.mean(areas)),
        "interval": list(percentiles(np.nanmean(known, axis=0))),
        "templates": len(np.unique(template)),
    }


def pair_accuracy(
    score: np.ndarray, label: np.ndarray, template: np.ndarray, seed: int
) -> dict[str, Any] | None:
    """Return the share of positive-negative pairs within a template that are ordered rightly.

    It is the mean over templates, ties count half, and the interval resamples templates. None if
    no template has both labels.
    """
    order = np.argsort(template, kind="stable")
    edges = np.flatnonzero(template[order][1:] != template[order][:-1]) + 1
    found = [
        float(auroc(score[some], label[some]))
        for some in np.split(order, edges)
        if len(some) and label[some].any() and not label[some].all()
    ]
    if not found:
        return None
    values = np.array(found)
    means = np.concatenate([drawn @ values for drawn in resamples(len(values), seed)]) / len(values)
    return {
        "value": float(values.mean()),
        "interval": list(percentiles(means)),
        "templates": len(values),
    }


def benign_threshold(benign: np.ndarray, rate: float) -> float | None:
    """Return the lowest threshold that at most `rate` of the ordinary scores exceed.

    None if there are fewer than `1 / rate` of them: then any rate below is a guess.
    """
    allowed = int(rate * len(benign) + 1e-9)
    return float(np.sort(benign)[::-1][allowed]) if 0 < allowed < len(benign) else None


def at_benign_rate(
    positive: np.ndarray, fold: np.ndarray, benign: Sequence[np.ndarray], rate: float
) -> dict[str, Any] | None:
    """Return the share of positives above the threshold that `rate` of ordinary texts exceed.

    Args:
        positive: [positives] scores.
        fold: [positives] int, indices into `benign`.
        benign: ordinary scores by fold.
        rate: of ordinary texts.
    """
    hits = 0
    thresholds = [benign_threshold(scores, rate) for scores in benign]
    for f, threshold in enumerate(thresholds):
        if threshold is None:
            return None
        hits += int((positive[fold == f] > threshold).sum())
    if not len(positive) or not thresholds:
        return None
    alone = thresholds[0] if len(thresholds) == 1 else None
    return {**(share(hits, len(positive)) or {}), "threshold": alone}


def share(hits: int, trials: int) -> dict[str, Any] | None:
    """Return a rate with its exact 95 % interval (Clopper and Pearson 1934); None without trials.

    The interval takes texts as independent.
    """
    if not trials:
        return None
    return {
        "value": hits / trials,
        "interval": list(interval(hits, trials)),
        "hits": hits,
        "texts": trials,
    }


def by_kind(detector: Detector, dataset: Dataset, seed: int) -> list[dict[str, Any]]:
    """Return the figures of each kind of positive, most frequent first.

    A kind's positives are compared with the negatives of that kind if it has `FEW` of them, else
    with all negatives of the dataset.
    """
    scored = ~np.isnan(detector.score)
    label, match = dataset.label & scored, detector.match
    kinds, counts = np.unique(dataset.kind[label], return_counts=True)
    rows = []
    for kind, count in sorted(zip(kinds.tolist(), counts.tolist(), strict=True), key=_frequent):
        positive = label & (dataset.kind == kind)
        own = scored & ~dataset.label & (dataset.kind == kind)
        few = int(own.sum()) < FEW
        negative = scored & ~dataset.label if few else own
        some = positive | negative
        enough = count >= FEW and int(negative.sum()) >= FEW
        rows.append(
            {
                "kind": kind,
                "positives": count,
                "negatives": int(negative.sum()),
                "against": "all negatives" if few else "negatives of the kind",
                "tpr": None if match is None else share(int(match[positive].sum()), count),
                "auroc": area(
                    detector.score[some],
                    dataset.label[some],
                    dataset.template[some],
                    detector.fold[some],
                    seed,
                )
                if enough
                else None,
            }
        )
    return rows


def _frequent(row: tuple[str, int]) -> tuple[int, str]:
    return -row[1], row[0]
