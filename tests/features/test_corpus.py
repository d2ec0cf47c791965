"""Texts are aggregated as the guard's rules do."""

from __future__ import annotations

import numpy as np
import pytest

from saeguard.features.corpus import Corpus, join, peaks, with_ordinary
from saeguard.features.reading import Reading
from saeguard.features.window import window_score
from tests.features.planted import corpus


@pytest.mark.parametrize(("k", "n"), [(1, 1), (2, 3), (3, 3), (2, 20)])
@pytest.mark.parametrize("scope", ["prompt", "output", "both"])
def test_peak_is_the_rules_score(k: int, n: int, scope: str) -> None:
    """Each text alone, in the guard's own arithmetic, has the same peak; windows end with it."""
    texts = corpus("search", 12).scoped(scope)  # type: ignore[arg-type]
    values = np.random.default_rng(0).standard_normal(len(texts.tokens)).astype(np.float32)
    got = peaks(texts, values, Reading(k, n))
    for i, begin in enumerate(texts.starts):
        span = slice(begin, begin + texts.lengths[i])
        alone = window_score(np.where(texts.looked[span], values[span], -np.inf), k, n)
        assert got[i] == np.float32(alone.max())


def test_special_tokens_are_not_looked_at() -> None:
    """A value at a special token never shows."""
    texts = corpus("search", 8).scoped("both")
    values = np.where(texts.special, 100.0, 1.0)
    assert peaks(texts, values).tolist() == [1.0] * 8


def test_selection_keeps_tokens_with_their_texts() -> None:
    """Selecting and joining texts leaves each text's tokens and labels together."""
    texts = corpus("search", 12)
    parts = [texts.select(np.arange(12) == i) for i in range(12)]
    whole: Corpus = parts[0]
    for part in parts[1:]:
        whole = join(whole, part)
    assert np.array_equal(whole.x, texts.x)
    assert np.array_equal(whole.label, texts.label)
    assert len(texts.of_kind("other")) == 6


def test_ordinary_texts_balance_the_negatives() -> None:
    """As many ordinary texts are added as there are labelled negatives, if there are."""
    labelled = corpus("search", 20)
    ordinary = corpus("benign", 50).of_kind("none")
    assert len(with_ordinary(labelled, ordinary)) == 30
    assert len(with_ordinary(labelled, ordinary.select(np.arange(25) < 3))) == 23


def test_texts_without_tokens_in_scope_are_left_out() -> None:
    """A text that a scope does not reach cannot be counted for it."""
    texts = corpus("search", 6)
    texts.output[: texts.lengths[0]] = False
    assert len(texts.scoped("output")) == 5
    assert len(texts.scoped("prompt")) == 6
