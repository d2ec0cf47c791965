"""Record the texts that `features learn` learns from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np

from saeguard.features.corpus import Corpus, norms_of
from saeguard.features.cut import PARTS
from saeguard.features.learn import Subject
from saeguard.features.massive import MeasuredNorms
from saeguard.hf.corpus import make_corpus
from saeguard.hf.labelled import Group
from saeguard.hf.model import LanguageModel
from saeguard.hf.texts import Text

Sinks: TypeAlias = tuple[dict[int, float], dict[int, MeasuredNorms]]
"""By layer: bounds on the norm, and what was measured."""


def record(
    lm: LanguageModel,
    groups: Sequence[Group],
    ordinary: Sequence[Text],
    cuts: tuple[Mapping[str, int], Mapping[str, int]],
    layers: Sequence[int],
    cache: Path | None,
    chosen: Mapping[int, float],
) -> tuple[
    Iterator[Subject],
    tuple[Corpus, Corpus, Corpus],
    tuple[dict[int, float], dict[int, MeasuredNorms]],
]:
    """Record the texts: subjects one by one, when they are asked for, and the ordinary parts.

    Args:
        lm: the model.
        groups: labelled texts.
        ordinary: ordinary texts.
        cuts: the part of each template, of labelled and of ordinary texts.
        layers: to be read.
        cache: folder that keeps what was recorded.
        chosen: bounds on the norm that a person chose, by layer.

    Returns:
        Subjects; parts of the ordinary texts; and by layer bounds on the norm, with what was
        measured on the ordinary texts.
    """
    part, calm = cuts
    corpus = make_corpus(lm, ordinary, layers, lm.special_tokens, "ordinary texts", cache)
    bounds, norms = norms_of(corpus, chosen)
    corpus = corpus.without_massive(bounds)
    of = np.array([calm[text.template] for text in ordinary])
    parts = [corpus.select(of == i) for i in range(len(PARTS))]

    def subjects() -> Iterator[Subject]:
        for group in groups:
            texts = group.texts
            yield Subject(
                name=group.name,
                title=f"{group.behaviour}: {group.name}"[:200],
                behaviour=group.behaviour,
                kind=group.kind,
                labelled=make_corpus(
                    lm, texts, layers, lm.special_tokens, group.name, cache
                ).without_massive(bounds),
                ids=np.array([text.id for text in texts]),
                part=np.array([part[text.template] for text in texts]),
            )

    return subjects(), (parts[0], parts[1], parts[2]), (bounds, norms)
