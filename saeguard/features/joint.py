"""Learn the topic of a behaviour, so that a policy may ask for both at once.

A detector that was chosen between a behaviour and its twins (insecure code and its repair) spreads
as widely on ordinary text, so a threshold for few ordinary texts catches nearly nothing. The topic
keeps ordinary texts out: it tells texts of the labelled sort, whatever their label, from ordinary
ones. Both are read alike, since a policy has one `for`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from saeguard.features.calibrate import Texts, calibrate, shares, values
from saeguard.features.corpus import Corpus, Scope, join, peaks
from saeguard.features.found import evidence_of, useless, with_found
from saeguard.features.reading import Reading, read_words
from saeguard.features.search import SearchError, search
from saeguard.features.stats import rate
from saeguard.features.types import Feature, FeatureSet

TOPIC = "_topic"
"""What the name of a behaviour's feature gets appended for its topic's."""


@dataclass(frozen=True, slots=True)
class TopicTexts:
    """What a topic is learnt from, all read in one scope."""

    labelled: tuple[Corpus, Corpus, Corpus]
    """To choose on, to set the range on, to measure on."""
    ordinary: tuple[Corpus, Corpus, Corpus]
    """To choose on, to set the threshold on, to measure on."""


def topic_of(feature: str) -> str:
    """Return the name of the feature that is the topic of another."""
    return f"{feature}{TOPIC}"


def add_topic(
    features: FeatureSet,
    feature: Feature,
    texts: TopicTexts,
    *,
    layers: Sequence[int],
    fpr: float,
    seed: int,
) -> FeatureSet:
    """Return the set with the topic of `feature`, a probe, and with what both do together.

    The topic's threshold is the share that the fraction `fpr` of ordinary texts exceeds under the
    reading of `feature`, so no more of them can match both. `feature` keeps its threshold.

    Args:
        features: holds `feature`, calibrated.
        feature: tells the behaviour from its twins.
        texts: of its topic, and ordinary ones.
        layers: for the probe: each alone and all together.
        fpr: wished fraction of ordinary texts that may match.
        seed: of the search.

    Raises:
        SearchError: there are too few texts, or they cannot be told from ordinary ones.
    """
    scope: Scope = feature.evidence["scope"]
    reading = read_words(feature.evidence["window"])
    found = search(
        None,
        beside(texts.labelled[0], texts.ordinary[0]),
        beside(texts.labelled[2], texts.ordinary[2]),
        layers=layers,
        seed=seed,
        readings=(reading,),
    )
    evidence = evidence_of(found, found.probe, scope, None)
    if nothing := useless(evidence):
        raise SearchError(f"the topic, labelled texts beside ordinary ones, is {nothing}")
    name = topic_of(feature.id)
    title = f"Topic of {feature.id}: texts of its sort rather than ordinary ones"
    new = with_found(features, name, title, feature.behaviour, found.probe, evidence)
    on_topic = [replace(c, label=np.ones(len(c), bool)) for c in texts.labelled]
    topic = calibrate(
        new,
        new.features[name],
        Texts(
            texts.ordinary[1],
            texts.ordinary[2],
            on_topic[1],
            beside(texts.labelled[2], texts.ordinary[2]),
        ),
        fpr=fpr,
    )
    # A topic's negatives are ordinary texts, which `fpr_holdout` counts already.
    told = {key: value for key, value in topic.evidence.items() if key != "twin_rate_holdout"}
    topic = replace(topic, evidence=told)
    together = {
        "threshold_set_on": "twins",
        "with_topic": measure_both(new, topic, feature, texts, reading),
    }
    feature = replace(feature, evidence={**feature.evidence, **together})
    return replace(new, features={**new.features, feature.id: feature, name: topic})


def measure_both(
    features: FeatureSet, topic: Feature, feature: Feature, texts: TopicTexts, reading: Reading
) -> dict[str, Any]:
    """Return how many texts match a policy that asks for topic and behaviour, for the evidence."""

    def counted(matched: np.ndarray) -> dict[str, Any]:
        return rate(int(matched.sum()), len(matched))

    holdout = texts.labelled[2]
    caught = matches(features, (topic, feature), holdout, reading)
    return {
        "thresholds": {topic.id: topic.threshold, feature.id: feature.threshold},
        "fpr_calibration": counted(matches(features, (topic, feature), texts.ordinary[1], reading)),
        "fpr_holdout": counted(matches(features, (topic, feature), texts.ordinary[2], reading)),
        "tpr_holdout": counted(caught[holdout.label]),
        "twin_rate_holdout": counted(caught[~holdout.label]),
    }


def matches(
    features: FeatureSet, asked: Sequence[Feature], corpus: Corpus, reading: Reading
) -> np.ndarray:
    """Return whether each text has all of `asked` above their thresholds, [texts] bool."""
    return (
        margins(
            [shares(f, values(features, f, corpus)) for f in asked],
            [f.threshold for f in asked],
            corpus,
            reading,
        )
        > 0
    )


def margins(
    share: Sequence[np.ndarray], above: Sequence[float], corpus: Corpus, reading: Reading
) -> np.ndarray:
    """Return by how much each text exceeds all thresholds, [texts] float32.

    Args:
        share: of each feature at each token, [T].
        above: the threshold of each.
        corpus: the texts.
        reading: of each feature; their strongest tokens need not be the same one.
    """
    pairs = zip(share, above, strict=True)
    out: np.ndarray = np.minimum.reduce([peaks(corpus, s, reading) - a for s, a in pairs])
    return out


def beside(labelled: Corpus, ordinary: Corpus) -> Corpus:
    """Return as many texts of a topic (label 1) as ordinary ones (label 0), spread evenly."""
    size = min(len(labelled), len(ordinary))
    of_topic, others = (_spread(corpus, size) for corpus in (labelled, ordinary))
    return join(
        replace(of_topic, label=np.ones(size, bool)), replace(others, label=np.zeros(size, bool))
    )


def thresholds_of(feature: Feature) -> Mapping[str, float]:
    """Return the thresholds of a policy for `feature`, and its topic's if it has one, by name."""
    both = feature.evidence.get("with_topic")
    return {feature.id: feature.threshold} if both is None else both["thresholds"]


def _spread(corpus: Corpus, size: int) -> Corpus:
    picked = np.zeros(len(corpus), bool)
    picked[np.linspace(0, len(corpus) - 1, size).astype(int)] = True
    return corpus.select(picked)
