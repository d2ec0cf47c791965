"""Set a feature's range and threshold, and measure what the threshold does.

The range makes shares readable: 0 is quiet, 1 is as strong as in the positive texts. The threshold
is the share that a given fraction of ordinary texts exceeds, with the aggregation of serving: over
all tokens in scope, and over the window if there is one. A threshold for single tokens would raise
more false alarms in longer texts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from saeguard.features.corpus import Corpus, Scope, peaks
from saeguard.features.measure_edit import measure_edit
from saeguard.features.probe import read_probe
from saeguard.features.reading import PEAK, Reading, read_words
from saeguard.features.search import read_values
from saeguard.features.stats import auroc, auroc_interval, rate
from saeguard.features.types import Feature, FeatureSet
from saeguard.features.value import share
from saeguard.features.weakness import FEW

MIN_SHARE = 0.05
"""Least threshold: a latent that is silent on ordinary texts must still rise out of the noise."""
SNIPPETS = 5
AROUND = 14
"""Tokens shown on each side of a snippet's strongest one."""
DIGITS = 4

MEASURED = (
    "fpr_holdout", "tpr_holdout", "twin_rate_holdout", "with_topic", "threshold_set_on",
)  # fmt: skip
"""What holds for one threshold, and is dropped if another is set without measuring it again."""
RANGED = ("reach", "highest")
"""What holds for one range."""

Decode = Callable[[list[int]], str]


@dataclass(frozen=True, slots=True)
class Texts:
    """The texts that a feature is calibrated on; every part except `benign` may be absent."""

    benign: Corpus
    """Sets the threshold."""
    check: Corpus | None = None
    """Other ordinary texts, to measure the false-positive rate on."""
    split: Corpus | None = None
    """Labelled texts, whose positives set the range."""
    holdout: Corpus | None = None
    """Other labelled texts, to measure the true-positive rate on."""


def values(features: FeatureSet, feature: Feature, corpus: Corpus) -> np.ndarray:
    """Return the feature's value at every token, [T] float32.

    Raises:
        SaeError: a latent cannot be read.
        ProbeError: the probe cannot be read.
    """
    if feature.probe is not None:
        return read_probe(feature.probe, features.model.hidden_size).logits(corpus.by_layer)
    assert features.sae is not None
    return read_values(features.sae.inspect(), feature.detect, corpus)


def shares(feature: Feature, value: np.ndarray) -> np.ndarray:
    """Return the shares of a feature's values, in the shape of `value`."""
    return share(value, feature.low, feature.high)


def calibrate(
    features: FeatureSet,
    feature: Feature,
    texts: Texts,
    *,
    fpr: float,
    reading: Reading | None = None,
    decode: Decode | None = None,
) -> Feature:
    """Return `feature` with its range, threshold and evidence set.

    Args:
        features: the set the feature belongs to.
        feature: what to calibrate. Its evidence may name a `scope` and a `kind`.
        texts: what to calibrate on.
        fpr: wished fraction of ordinary texts above the threshold.
        reading: how a text is judged by its tokens' values; None as the evidence states, or by the
            strongest token.
        decode: from token ids to text, for snippets; None leaves them out.
    """
    scope: Scope = feature.evidence.get("scope", "output")
    kind = feature.evidence.get("kind")
    if reading is None:
        reading = read_words(str(feature.evidence.get("window", PEAK.words)))

    tops: list[float] = []

    def peaks_of(corpus: Corpus) -> np.ndarray:
        value = values(features, feature, corpus)
        tops.append(float(value[corpus.looked].max(initial=-np.inf)))
        return peaks(corpus, value, reading)

    benign = texts.benign.scoped(scope)
    quiet = peaks_of(benign)
    split = texts.split and texts.split.scoped(scope).of_kind(kind)
    positive = None if split is None else peaks_of(split)[split.label]
    before = feature.low, feature.high
    feature = _with_range(features, feature, quiet, positive)
    stale = MEASURED if (feature.low, feature.high) == before else (*MEASURED, *RANGED)
    threshold = threshold_for(shares(feature, quiet), fpr)
    feature = replace(feature, threshold=threshold)

    def above(corpus: Corpus) -> np.ndarray:
        out: np.ndarray = shares(feature, peaks_of(corpus)) > threshold
        return out

    kept = {key: value for key, value in feature.evidence.items() if key not in stale}
    evidence: dict[str, Any] = kept | {
        "window": reading.words,
        "fpr_target": fpr,
        "fpr_calibration": _rate(above(benign)),
    }
    if texts.check is not None:
        evidence["fpr_holdout"] = _rate(above(texts.check.scoped(scope)))
    if texts.holdout is not None:
        holdout = texts.holdout.scoped(scope).of_kind(kind)
        fired = above(holdout)
        evidence["tpr_holdout"] = _rate(fired[holdout.label])
        evidence["twin_rate_holdout"] = _rate(fired[~holdout.label])
        if "holdout" not in evidence:  # by a search, usually
            evidence["holdout"] = _area(holdout, peaks_of(holdout))
    shown = texts.holdout or texts.split
    if shown is not None:
        evidence["reach"] = _reach(features, feature, shown.scoped(scope).of_kind(kind))
    evidence["highest"] = round(float(shares(feature, np.array(max(tops)))), DIGITS)
    if feature.clamp:
        evidence["edit"] = measure_edit(features, feature, benign)
    if decode is not None and split is not None:
        at_tokens = shares(feature, values(features, feature, split))
        evidence["snippets"] = snippets(split, at_tokens, decode)
    return replace(feature, evidence=evidence)


def _with_range(
    features: FeatureSet, feature: Feature, quiet: np.ndarray, positive: np.ndarray | None
) -> Feature:
    """Return a feature with the range that ordinary and positive texts' peaks [texts] show."""
    low = float(np.median(quiet)) if feature.probe is not None else 0.0
    if positive is not None:
        high = float(np.quantile(positive, 0.99))
    elif features.status == "published" or math.isnan(feature.low) or math.isnan(feature.high):
        # No range was measured: 1 is then as strong as ordinary texts showed.
        high = float(quiet.max())
    else:
        return feature
    # A feature that is no stronger on positives has no range; keep it finite for the report.
    return replace(feature, low=_rounded(low), high=_rounded(max(high, low + 1e-3)))


def threshold_for(share: np.ndarray, fpr: float) -> float:
    """Return the least threshold that at most the fraction `fpr` of `share` [texts] exceeds."""
    allowed = math.floor(fpr * len(share))
    kth = float(np.sort(share)[::-1][min(allowed, len(share) - 1)])
    return float(max(math.ceil(kth * 10**DIGITS) / 10**DIGITS, MIN_SHARE))


def snippets(corpus: Corpus, share: np.ndarray, decode: Decode) -> list[Mapping[str, Any]]:
    """Return the strongest texts, each around its strongest token, which is marked `>>x<<`.

    Args:
        corpus: the texts; at most one snippet of each template is shown.
        share: [T] the feature's share at every token.
        decode: from token ids to text.
    """
    trace = np.where(corpus.looked, share, -np.inf)
    peak = peaks(corpus, trace)
    shown: dict[str, Mapping[str, Any]] = {}
    for text in np.argsort(-peak, kind="stable"):
        if len(shown) == SNIPPETS:
            break
        begin = int(corpus.starts[text])
        end = begin + int(corpus.lengths[text])
        at = begin + int(trace[begin:end].argmax())
        ids = corpus.tokens
        before, after = max(begin, at - AROUND), min(end, at + 1 + AROUND)
        marked = (
            f"{decode(ids[before:at].tolist())}>>{decode([int(ids[at])])}<<"
            f"{decode(ids[at + 1 : after].tolist())}"
        )
        shown.setdefault(
            str(corpus.template[text]),
            {
                "share": round(float(peak[text]), 2),
                "text": marked,
                "label": int(corpus.label[text]),
            },
        )
    return list(shown.values())


def _reach(features: FeatureSet, feature: Feature, labelled: Corpus) -> float:
    """Return the share that the fraction `FEW` of the positives exceeds with any token."""
    single = peaks(labelled, values(features, feature, labelled))[labelled.label]
    return threshold_for(shares(feature, single), FEW)


def _rate(fired: np.ndarray) -> dict[str, Any]:
    return rate(int(fired.sum()), len(fired))


def _area(corpus: Corpus, scores: np.ndarray) -> dict[str, Any]:
    low, high = auroc_interval(scores, corpus.label, corpus.template, seed=0)
    area = float(auroc(scores, corpus.label))
    return {"auroc": round(area, 4), "interval": [round(low, 4), round(high, 4)]}


def _rounded(value: float) -> float:
    """Round to five significant digits, so that the file is readable."""
    return float(f"{value:.5g}")
