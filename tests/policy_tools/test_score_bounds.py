"""What an event tells of another policy never contradicts what the tokens tell."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from saeguard.guard.judge import judge
from saeguard.guard.verdict import Fired, Verdict
from saeguard.policy.types import And, Name, Not, Or, Over, Policy, Selection, Window
from saeguard.policy_tools.score_bounds import Recorded, foretell, same_verdict, verdict_of
from tests.policy.example import policy
from tests.policy.test_condition import EXPRESSIONS, NAMES

with TemporaryDirectory() as name:
    BASE = policy(Path(name))

SHARES = st.sampled_from([-1.0, 0.0, 0.25, 0.5, 0.75, 1.0, 2.0]) | st.floats(-2, 2, width=32)
ABOVE = st.sampled_from([0.25, 0.5, 1.0])


@st.composite
def policies(draw: st.DrawFn) -> Policy:
    """Return a policy over four features."""
    n = draw(st.integers(1, 6))
    over = st.just(Over()) | st.builds(Over, st.sampled_from(["mean", "max"]), st.integers(2, 4))
    return replace(
        BASE,
        scope="both",
        detect={x: Selection(x, draw(ABOVE), draw(over)) for x in NAMES},
        condition=draw(EXPRESSIONS),
        window=draw(st.just(Window()) | st.just(Window(draw(st.integers(1, n)), n))),
    )


def seen(verdict: Verdict) -> Recorded:
    """Return what the event of a verdict keeps, in the digits it keeps."""
    rounded = {x: Fired(f.count, round(f.max, 6), f.at) for x, f in verdict.features.items()}
    return Recorded(verdict.score, rounded)


TRACES = st.integers(1, 12).flatmap(
    lambda n: st.fixed_dictionaries(
        {x: st.lists(SHARES, min_size=n, max_size=n).map(np.array) for x in NAMES}
    )
)


def holds(old: Policy, new: Policy, traces: Mapping[str, np.ndarray]) -> None:
    """Compare what is foretold of `new` from the event of `old` with its verdict."""
    event, actual = judge(old, traces, 0), judge(new, traces, 0)

    low, high = foretell(seen(event), old, new)

    if actual.score is not None:
        assert low - 1e-9 <= actual.score <= high + 1e-9
    if actual.outcome in {"match", "no_match"} and event.score is not None:
        assert verdict_of((low, high)) in {actual.outcome, "unknown"}


@settings(deadline=None, max_examples=150)
@given(policies(), policies(), TRACES)
def test_of_any_other_policy(old: Policy, new: Policy, traces: Mapping[str, np.ndarray]) -> None:
    """Conditions, windows and aggregates may all differ."""
    holds(old, new, traces)


@settings(deadline=None, max_examples=150)
@given(policies(), st.lists(ABOVE, min_size=4, max_size=4), TRACES)
def test_of_other_thresholds(
    old: Policy, above: list[float], traces: Mapping[str, np.ndarray]
) -> None:
    """Only the thresholds differ."""
    detect = {
        x: replace(selection, above=a)
        for (x, selection), a in zip(old.detect.items(), above, strict=True)
    }
    holds(old, replace(old, detect=detect), traces)


def one(above: float, **changes: Any) -> Policy:
    """Return a policy that reads one feature at one token."""
    detect = {"a": Selection("a", above)}
    plain = replace(BASE, detect=detect, condition=Name("a"), window=Window())
    return replace(plain, **changes)


def two(condition: And | Or) -> Policy:
    """Return a policy that reads two features at one token."""
    detect = {x: Selection(x, 0.5) for x in "ab"}
    return replace(BASE, detect=detect, condition=condition, window=Window())


A, B = Name("a"), Name("b")
EVENT = Recorded(1.8, {"a": Fired(2, 0.9, 4), "b": Fired(1, 0.8, 4)})
APART = Recorded(1.8, {"a": Fired(2, 0.9, 4), "b": Fired(1, 0.8, 7)})


@pytest.mark.parametrize(
    ("event", "new", "verdict"),
    [
        (EVENT, one(0.89), "match"),
        (EVENT, one(0.9), "unknown"),  # within the rounding of the event
        (EVENT, one(0.91), "no_match"),
        (EVENT, one(0.5, window=Window(2, 4)), "unknown"),
        (EVENT, one(0.95, window=Window(2, 4)), "no_match"),
        (EVENT, one(0.5, scope="prompt"), "unknown"),
        (EVENT, two(And((A, B))), "match"),  # both peaks are at one token
        (APART, two(And((A, B))), "unknown"),
        (APART, two(Or((A, B))), "match"),
        (EVENT, two(And((A, Not(B)))), "unknown"),
        (Recorded(0.2, {"a": Fired(0, 0.4, 4)}), two(And((A, B))), "no_match"),
        (EVENT, replace(one(0.89), feature_set="another"), "unknown"),
    ],
)
def test_answers(event: Recorded, new: Policy, verdict: str) -> None:
    """It does answer: not everything is unknown."""
    assert verdict_of(foretell(event, one(0.5), new)) == verdict


def test_what_no_verdict_depends_on() -> None:
    """Words, owners and actions change no verdict; everything else may."""
    old = one(0.5)

    assert same_verdict(old, replace(old, title="x", mode="enforce", action="stop", digest="0"))
    assert not same_verdict(old, replace(old, scope="prompt"))
    assert not same_verdict(old, replace(old, sample=0.5))
