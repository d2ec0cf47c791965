"""From the labelled texts of one behaviour to a calibrated feature, or to why there is none."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from saeguard.features.calibrate import Decode, Texts, calibrate
from saeguard.features.corpus import Corpus, Scope, with_ordinary
from saeguard.features.cut import FRACTIONS, PARTS
from saeguard.features.found import Form, choose, evidence_of, useless, with_found
from saeguard.features.joint import TopicTexts, add_topic
from saeguard.features.reading import READINGS, Reading
from saeguard.features.search import MIN_HOLD_OUT, Search, SearchError, search
from saeguard.features.types import Feature, FeatureSet
from saeguard.features.weakness import useless_with_topic, weaknesses
from saeguard.sae import SaeInfo

ENOUGH = math.ceil(MIN_HOLD_OUT / FRACTIONS[-1])
"""Texts of a label of which the hold-out part gets as many as it needs."""


@dataclass(frozen=True, slots=True)
class Wish:
    """How features are to be found and calibrated."""

    scope: Scope = "output"
    form: Form = "best"
    fpr: float = 0.001
    """Wished fraction of ordinary texts above the threshold."""
    readings: tuple[Reading, ...] = READINGS
    """How a text may be judged by its tokens' values; the search chooses for a probe."""
    layers: tuple[int, ...] = ()
    """For probes: each alone and all together. Empty: the SAE's."""
    top: int = 20
    group_size: int = 8
    seed: int = 0
    accept_weak: bool = False
    """Keep a detector that is no better than chance."""
    labelled_only: bool = False
    """Choose on labelled texts alone; else ordinary texts are negatives, too."""
    topic: bool = False
    """Learn the topic as a feature of its own. Ordinary texts then set only its threshold; the
    behaviour is chosen on labelled texts alone, and twins set its threshold."""
    twin_fpr: float = 0.05
    """Wished fraction of twins above the behaviour's threshold, with `topic`."""


@dataclass(frozen=True, slots=True)
class Subject:
    """What is to be learnt, and its recorded texts."""

    name: str
    """Of the feature."""
    title: str
    behaviour: str
    kind: str
    labelled: Corpus
    ids: np.ndarray
    """[texts] their ids."""
    part: np.ndarray
    """[texts] index into `PARTS`."""


@dataclass(frozen=True, slots=True)
class Learned:
    """The outcome for one subject."""

    subject: Subject
    texts: Mapping[str, tuple[int, int]]
    """By part, how many texts show the behaviour and how many do not."""
    found: Search | None
    """None if there are too few texts."""
    feature: Feature | None
    """None if nothing was found."""
    reason: str = ""
    """Why there is no feature, or what speaks against it."""

    def report(self) -> dict[str, Any]:
        """Return a plain row, for a file."""
        subject, feature = self.subject, self.feature
        return {
            "feature": subject.name,
            "behaviour": subject.behaviour,
            "kind": subject.kind or None,
            "texts": {part: list(counts) for part, counts in self.texts.items()},
            "learnt": feature is not None,
            "reason": self.reason,
            "threshold": None if feature is None else feature.threshold,
            "evidence": None if feature is None else dict(feature.evidence),
            "findings": [] if self.found is None else self.found.report(),
        }


def learn(
    features: FeatureSet,
    info: SaeInfo | None,
    subject: Subject,
    ordinary: tuple[Corpus, Corpus, Corpus],
    wish: Wish,
    decode: Decode | None = None,
) -> tuple[FeatureSet, Learned]:
    """Return the set with the subject's feature, calibrated, and the outcome.

    Each step has texts of its own: the detector is chosen on the search part, its range is set on
    the calibration part, and AUROC and true-positive rate are measured on the hold-out. Ordinary
    texts are cut likewise, so that no rate is measured on the texts that set it.

    With `wish.topic` the threshold is set on the twins of the calibration part, and the topic is a
    feature of its own (`joint`).

    Args:
        features: the set so far.
        info: its SAE, if there is one.
        subject: what is to be learnt.
        ordinary: texts to choose on, to set the threshold on, and to measure its rate on.
        wish: how.
        decode: from token ids to text, for snippets.

    Raises:
        SaeError: a latent cannot be read.
    """
    scoped = replace(subject.labelled, scope=wish.scope)
    parts = [scoped.select(subject.part == i).scoped(wish.scope) for i in range(len(PARTS))]
    counts = {
        name: (int(part.label.sum()), int((~part.label).sum()))
        for name, part in zip(PARTS, parts, strict=True)
    }
    split, calibration, holdout = parts
    alone = wish.labelled_only or wish.topic
    try:
        _check(counts)
        found = search(
            info,
            split if alone else with_ordinary(split, ordinary[0].scoped(wish.scope)),
            holdout,
            layers=wish.layers or None,
            top=wish.top,
            group_size=wish.group_size,
            seed=wish.seed,
            readings=wish.readings,
        )
    except SearchError as error:
        return features, Learned(subject, counts, None, None, f"not searched: {error}")
    chosen = choose(found, wish.form)
    evidence = evidence_of(found, chosen, wish.scope, None)
    nothing = useless(evidence)
    if nothing and not wish.accept_weak:
        return features, Learned(subject, counts, found, None, nothing)
    new = with_found(features, subject.name, subject.title, subject.behaviour, chosen, evidence)
    feature = calibrate(
        new,
        new.features[subject.name],
        Texts(
            calibration.select(~calibration.label) if wish.topic else ordinary[1],
            ordinary[2],
            calibration,
            holdout,
        ),
        fpr=wish.twin_fpr if wish.topic else wish.fpr,
        decode=decode,
    )
    done = replace(new, features={**new.features, subject.name: feature})
    if wish.topic:
        try:
            done = _with_topic(done, feature, parts, ordinary, wish)
        except SearchError as error:
            return features, Learned(subject, counts, found, None, str(error))
        feature = done.features[subject.name]
    against = [
        *weaknesses(feature, feature.threshold, feature.evidence["window"]),
        *filter(None, [useless_with_topic(feature.evidence)]),
    ]
    return done, Learned(subject, counts, found, feature, "; ".join(against))


def _with_topic(
    features: FeatureSet,
    feature: Feature,
    labelled: Sequence[Corpus],
    ordinary: tuple[Corpus, Corpus, Corpus],
    wish: Wish,
) -> FeatureSet:
    first, second, third = (corpus.scoped(wish.scope) for corpus in ordinary)
    layers = wish.layers or ((features.sae.layer,) if features.sae else first.layers)
    texts = TopicTexts((labelled[0], labelled[1], labelled[2]), (first, second, third))
    return add_topic(features, feature, texts, layers=layers, fpr=wish.fpr, seed=wish.seed)


def held_out(subject: Subject, scope: Scope) -> tuple[Corpus, np.ndarray]:
    """Return the hold-out's texts with tokens in scope, and their ids."""
    scoped = replace(subject.labelled, scope=scope)
    counts = np.bincount(scoped.owner, weights=scoped.looked, minlength=len(scoped))
    mask = (subject.part == PARTS.index("holdout")) & (counts > 0)
    return scoped.select(mask), subject.ids[mask]


def check_texts(
    subjects: Mapping[str, Sequence[tuple[int, int]]], ordinary: Sequence[int], scope: Scope
) -> None:
    """Refuse texts of which nothing can be learnt, before the model reads them.

    Args:
        subjects: by name, how many texts of each part show the behaviour and how many do not.
        ordinary: how many ordinary texts of each part have a token in scope.
        scope: tokens to look at.

    Raises:
        SearchError: says how many there are, and how many are needed.
    """
    empty = [name for name, n in zip(PARTS, ordinary, strict=True) if not n]
    if empty:
        raise SearchError(
            f"--benign: expected ordinary texts with tokens in scope {scope}, got none for the "
            f"{' and '.join(empty)} part ({sum(ordinary)} in all); give more, or another --scope"
        )
    needed = {PARTS[0]: MIN_HOLD_OUT, PARTS[1]: 1, PARTS[2]: MIN_HOLD_OUT}
    short = [
        f"{name} has {positives} positive and {negatives} negative texts in the {part} part"
        for name, counts in subjects.items()
        for part, (positives, negatives) in zip(PARTS, counts, strict=True)
        if min(positives, negatives) < needed[part]
    ]
    if len({line.split(" has ")[0] for line in short}) == len(subjects):
        raise SearchError(
            f"too few labelled texts: expected {MIN_HOLD_OUT} of each label in the search and in "
            f"the holdout part, which is about {ENOUGH} of each label in a file; {short[0]}"
        )


def _check(counts: Mapping[str, tuple[int, int]]) -> None:
    for name, (positives, negatives) in counts.items():
        if not positives or not negatives:
            raise SearchError(
                f"the {name} part has {positives} positive and {negatives} negative texts"
            )
