"""Attention sinks: the bound on the norm, what was measured, and what is left out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from saeguard.features.corpus import Corpus, norms_of, peaks
from saeguard.features.load import load_feature_set, save_feature_set
from saeguard.features.massive import (
    NO_BOUND,
    chosen_bounds,
    is_massive,
    left_out,
    measure_norms,
)
from tests import guarded
from tests.features.planted import corpus

NORM = np.array([1000.0, 10, 11, 9, 900, 10, 12, 8, 10, 10])
POSITION = np.array([0, 1, 2, 3, 0, 1, 2, 3, 4, 5])


def with_sinks(texts: Corpus) -> Corpus:
    """Return the texts with a massive second token in each; the first is special."""
    x = texts.x.clone()
    x[torch.from_numpy(texts.position == 1)] *= 1000
    return replace(texts, x=x)


def test_the_bound_is_ten_medians() -> None:
    """Both sides of it are measured, and positions are counted."""
    bound, measured = measure_norms(NORM, POSITION)

    assert bound == measured.usual_bound == 100.0
    assert (measured.median, measured.tokens, measured.massive) == (10.0, 10, 2)
    assert (measured.lowest, measured.highest, measured.kept_highest) == (900.0, 1000.0, 12.0)
    assert measured.positions == {0: 2}
    assert measured.in_words(bound) == (
        "norms have the median 10, tokens above 100 are left out: 2 of 10, at position 0 (2), with "
        "norms from 900 to 1000; the highest other norm is 12 (1.2 medians)"
    )
    assert measured.doubt(bound) == ""


def test_a_bound_in_no_gap_is_doubted() -> None:
    """A sink of eight medians is not left out by itself, and the report says so."""
    norm = np.where(NORM > 100, 80.0, NORM)
    bound, measured = measure_norms(norm, POSITION)

    assert measured.massive == 0
    assert "none of 10 is" in measured.in_words(bound)
    assert "tokens reach the norm 80 (8.0 medians)" in measured.doubt(bound)
    assert measure_norms(norm, POSITION, 50.0)[1].massive == 2


def test_a_norm_that_is_not_finite_is_no_sink() -> None:
    """It is an error, and not left out as something known."""
    assert is_massive(np.array([np.nan, np.inf, 101.0, 100.0]), 100.0).tolist() == [
        False, False, True, False,
    ]  # fmt: skip
    with pytest.raises(ValueError, match="no token has a finite norm"):
        measure_norms(np.array([np.nan]), np.array([0]))


def test_a_bound_that_a_person_wrote_stays() -> None:
    """One that follows from its own measurement is measured again."""
    _, measured = measure_norms(NORM, POSITION)

    assert chosen_bounds({1: 100.0, 2: 50.0, 3: 7.0}, {1: measured, 2: measured}) == {
        2: 50.0,
        3: 7.0,
    }


def test_sinks_are_not_looked_at() -> None:
    """Neither the search nor calibration sees a value at them."""
    texts = with_sinks(corpus("search", 8).scoped("both"))
    bounds, norms = norms_of(texts)
    values = np.where(texts.position < 2, 100.0, 1.0)

    assert norms[texts.layers[0]].positions == {1: 8}
    assert peaks(texts, values).tolist() == [100.0] * 8
    assert peaks(texts.without_massive(bounds), values).tolist() == [1.0] * 8


def test_bounds_are_saved_with_what_they_were_measured_from(tmp_path: Path) -> None:
    """A set without them keeps its digest, and one with them is another set."""
    features = guarded.feature_set(tmp_path, 8)
    before = load_feature_set(features.path)
    bound, measured = measure_norms(NORM, POSITION)
    save_feature_set(replace(before, max_norm={1: bound}, norms={1: measured}), features.path)
    after = load_feature_set(features.path)

    assert (after.max_norm, after.norms) == ({1: 100.0}, {1: measured})
    assert after.digest != before.digest
    save_feature_set(replace(after, max_norm={}, norms={}), features.path)
    assert load_feature_set(features.path).digest == before.digest


def test_what_a_set_leaves_out_is_reported() -> None:
    """A set without a bound, one that a person wrote, and a measured one."""
    bound, measured = measure_norms(NORM, POSITION)

    assert left_out(None, None) == NO_BOUND
    assert "above 50 are left out, a bound that was not measured" in left_out(50.0, None)
    assert left_out(bound, measured) == measured.in_words(bound)
