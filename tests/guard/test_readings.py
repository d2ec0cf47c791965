"""The values of whole texts are collected token by token, and a gap is never filled."""

from __future__ import annotations

import numpy as np

from saeguard.guard.readings import Reading, Readings, most_tokens, reading_of
from saeguard.guard.tables import ERROR, EVALUATED, SPECIAL


def block(values: list[float], *, eligible: bool = True, finite: bool = True) -> Reading:
    """Return consecutive tokens of one request with one feature."""
    n = len(values)
    parts = np.full(n, eligible), np.full(n, finite), np.zeros(n, bool)
    return reading_of(np.array(values, np.float32)[:, None], *parts)


def test_blocks_add_up_to_the_text() -> None:
    """Chunks of a prompt, with a special token and one that could not be read."""
    readings = Readings()
    readings.admit("a")
    readings.take("a", 0, block([9.0], eligible=False))
    readings.take("a", 1, block([1.0, 2.0]))
    readings.take("a", 3, block([7.0], finite=False))
    readings.take("a", 4, block([4.0, 5.0]))
    read = readings.pop("a", 5)
    assert read is not None
    assert read.state.tolist() == [SPECIAL, EVALUATED, EVALUATED, ERROR, EVALUATED]
    assert read.evaluable.tolist() == [False, True, True, True, True]
    np.testing.assert_array_equal(read.values[:, 0], [9.0, 1.0, 2.0, np.nan, 4.0])


def test_a_gap_ends_the_reading() -> None:
    """Tokens after one that was not read are not taken for its neighbours."""
    readings = Readings()
    readings.admit("a")
    readings.take("a", 0, block([1.0]))
    readings.take("a", 2, block([3.0]))
    read = readings.pop("a", 3)
    assert read is not None
    assert read.values.tolist() == [[1.0]]


def test_other_requests_leave_nothing() -> None:
    """The self-test's requests, and rows of a request that has ended."""
    readings = Readings()
    readings.take("b", 0, block([1.0]))
    assert readings.pop("b", 1) is None
    readings.admit("a")
    assert readings.pop("a", 1) is None
    readings.take("a", 0, block([1.0]))
    assert readings.pop("a", 1) is None


def test_memory_bounds_the_texts_under_way() -> None:
    """The more features, the fewer tokens; one text always goes."""
    assert most_tokens(1) == 2**26
    assert most_tokens(1000) == 67108
    assert most_tokens(2**30) == 1


def test_special_tokens_are_special_whatever_their_values() -> None:
    """A token that is excluded does not become an error."""
    nothing = np.array([[np.nan]], np.float32)
    assert reading_of(nothing, *np.zeros((3, 1), bool)).state.tolist() == [SPECIAL]
    every = np.ones((3, 1), bool)
    assert reading_of(nothing, *every).massive.tolist() == [True]
