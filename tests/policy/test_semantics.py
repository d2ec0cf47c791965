"""The guard's fast rules against the slow, plain ones of tests/reference.py."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from saeguard.guard.judge import judge
from saeguard.policy.types import Expr, Over, Policy, Scope, Selection, Window
from tests import reference
from tests.policy.example import policy
from tests.policy.test_condition import EXPRESSIONS, NAMES

with TemporaryDirectory() as name:
    BASE = policy(Path(name))

OVER = st.just(Over()) | st.builds(
    Over, st.sampled_from(["mean", "max", "average", "peak"]), st.integers(1, 12)
)
SHARES = st.sampled_from([-1.0, 0.0, 0.25, 0.5, 0.75, 1.0, 2.0]) | st.floats(-2, 2, width=32)


@st.composite
def situations(draw: st.DrawFn) -> tuple[Policy, Mapping[str, list[float]], int]:
    """Return a policy, shares and the length of the prompt; thresholds are often met exactly."""
    n = draw(st.integers(1, 8))
    tokens = draw(st.integers(1, 24))
    rules = replace(
        BASE,
        detect={
            x: Selection(x, draw(st.sampled_from([0.25, 0.5, 1.0])), draw(OVER)) for x in NAMES
        },
        condition=draw(EXPRESSIONS),
        window=Window(draw(st.integers(1, n)), draw(st.sampled_from([n, n, n, None]))),
        keep=draw(st.integers(0, 6)),
        scope=draw(st.sampled_from(["prompt", "output", "both"])),
    )
    traces = st.lists(SHARES, min_size=tokens, max_size=tokens)
    return rules, {x: draw(traces) for x in NAMES}, draw(st.integers(0, tokens))


@settings(deadline=None, max_examples=200)
@given(situations())
def test_same_verdict(situation: tuple[Policy, Mapping[str, list[float]], int]) -> None:
    """Match, first token, tokens on and coverage agree on any policy and text."""
    rules, shares, prompt_tokens = situation

    expected = reference.judge(rules, shares, prompt_tokens)
    verdict = judge(rules, {x: np.array(s) for x, s in shares.items()}, prompt_tokens)

    in_scope = sum(
        reference.in_scope(rules, t, prompt_tokens) for t in range(len(shares[NAMES[0]]))
    )
    assert (verdict.outcome == "match") == bool(expected.match)
    assert verdict.first_token == expected.first_token
    assert verdict.matched_tokens == expected.matched_tokens
    assert (verdict.coverage.tokens, verdict.coverage.evaluated) == (in_scope, in_scope)
    if expected.score is None:
        assert verdict.score is None
    else:
        assert verdict.score == pytest.approx(expected.score, abs=1e-9)


@pytest.mark.parametrize(
    ("scope", "trace", "match", "on"),
    [
        ("output", [0, 0, 9, 0, 9, 0, 0, 0], [4], [4, 5, 6]),
        ("output", [9, 9, 9, 0, 0, 0, 0, 0], [], []),
        ("both", [9, 9, 0, 0, 9, 0, 0, 0], [1, 2], [1, 2, 3, 4]),
        ("prompt", [9, 9, 0, 0, 0, 0, 0, 0], [1, 2], [1, 2, 3, 4]),
        ("output", [0, 0, 1, 1, 1, 1, 0, 0], [], []),
    ],
)
def test_reference(scope: Scope, trace: list[float], match: list[int], on: list[int]) -> None:
    """The reference itself, on texts that fit on one line: 2 of 3 tokens, above 1, keep 2."""
    condition: Expr = BASE.condition
    rules = replace(
        BASE,
        scope=scope,
        window=Window(2, 3),
        keep=2,
        condition=condition,
        detect={x: Selection("f", 1.0) for x in ("shell", "untrusted")},
    )

    judged = reference.judge(rules, {"f": trace}, prompt_tokens=2)

    assert (judged.match, judged.on) == (tuple(match), tuple(on))
