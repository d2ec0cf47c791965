"""Rules on whole texts say what the slow, plain reading of the policy says."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from saeguard.features.window import window_score
from saeguard.guard.clamp.condition_program import compile_program, evidence, on_device
from saeguard.guard.judge import alone, judge, judge_text, on_tokens, score_text, strongest
from saeguard.guard.verdict import Coverage, Verdict, balanced
from saeguard.policy.types import And, KOf, Name, Not, Or, Policy, Selection, Window
from tests import reference
from tests.guard import plain
from tests.guard.watchlists import (
    FEATURES,
    coded,
    make_policy,
    make_watchlist,
    random_activations,
    random_condition,
    random_policy,
    random_roles,
    seeded,
)

SEEDS = st.integers(0, 2**32 - 1)


def said(verdict: Verdict, *, coverage: bool = True) -> plain.Said:
    """Return the parts of a verdict that a plain reading gives, too."""
    counted = verdict.coverage if coverage else Coverage(0, 0, {})
    return plain.Said(
        verdict.outcome,
        verdict.score,
        verdict.first_token,
        verdict.matched_tokens,
        {name: (f.count, f.max, f.at) for name, f in verdict.features.items()},
        counted.tokens,
        counted.evaluated,
        dict(counted.skipped),
    )


def assert_same(
    expected: plain.Said, verdict: Verdict, policy: Policy, *, coverage: bool = True
) -> None:
    """Assert that a verdict says what is expected, apart from the last bits of its score.

    These depend on where a text is cut, for averages with a half-life; and of positions that are
    equal but for them, which is the highest.
    """
    rounded = {s.feature for s in policy.detect.values() if s.over and s.over.kind == "average"}
    found = said(verdict, coverage=coverage)
    assert plain.same_score(expected.score, found.score), (policy, expected, found)
    assert expected.features.keys() == found.features.keys()
    for name, (count, peak, at) in expected.features.items():
        assert count == found.features[name][0], (policy, name)
        assert at == found.features[name][2] or name in rounded, (policy, name)
        assert plain.same_score(peak, found.features[name][1]), (policy, name)
    left = {"score": None, "features": None}
    assert {**vars(expected), **left} == {**vars(found), **left}, policy


def columns(shares: np.ndarray) -> dict[str, list[float]]:
    """Return shares as the plain reading takes them."""
    return {f"f{j}": [float(x) for x in shares[:, j]] for j in range(FEATURES)}


def check_world(seed: int) -> None:
    """Judge one random text by random policies, fast and plain."""
    rng = seeded(seed)
    tokens = rng.randint(1, 14)
    prompt = rng.randint(0, tokens)
    policies = [random_policy(rng, f"p{i}", longest=20) for i in range(4)]
    watchlist = make_watchlist(policies)
    roles = random_roles(rng, prompt)
    f = random_activations(rng, tokens)
    status = ["evaluated"] * tokens
    for t in range(tokens):
        if rng.random() < 0.1:
            status[t] = "special_token"
        elif rng.random() < 0.1:
            status[t] = "error"
            f[t, rng.randrange(FEATURES)] = rng.choice([np.nan, np.inf, -np.inf])
    with np.errstate(invalid="ignore"):
        shares = watchlist.shares(f)
        verdicts = judge_text(
            watchlist.rules,
            shares,
            np.array([s != "special_token" for s in status]),
            prompt,
            coded(roles),
        )
    for policy, verdict in zip(policies, verdicts, strict=True):
        assert_same(plain.judge(policy, columns(shares), status, prompt, roles), verdict, policy)
        assert balanced(verdict.coverage)


@given(SEEDS)
@settings(derandomize=True, deadline=None, max_examples=200)
def test_judge_all_is_the_plain_reading(seed: int) -> None:
    """Outcome, score, positions, counts and coverage agree, excluded and NaN tokens included."""
    check_world(seed)


@pytest.mark.slow
@given(SEEDS)
@settings(deadline=None, max_examples=25_000)
def test_judge_all_is_the_plain_reading_at_length(seed: int) -> None:
    """The same, on 100,000 pairs of a random policy and a random text: four policies a text."""
    check_world(seed)


@given(SEEDS)
@settings(derandomize=True, deadline=None, max_examples=200)
def test_judge_is_the_reference(seed: int) -> None:
    """The judge of policy tests agrees with the reference interpreter."""
    rng = seeded(seed)
    tokens = rng.randint(1, 14)
    prompt = rng.randint(0, tokens)
    policy = random_policy(rng, "p", longest=20)
    shares = columns(random_activations(rng, tokens))

    roles = random_roles(rng, prompt)

    expected = reference.judge(policy, shares, prompt, roles)
    verdict = judge(policy, {n: np.array(s) for n, s in shares.items()}, prompt, coded(roles))

    assert expected.first_token == verdict.first_token
    assert expected.matched_tokens == verdict.matched_tokens
    assert plain.same_score(expected.score, verdict.score)


@given(SEEDS)
@settings(derandomize=True, deadline=None, max_examples=100)
def test_evidence_is_the_same_on_torch(seed: int) -> None:
    """The clamp inside the forward and the rules on the host read a condition alike."""
    import torch

    rng = seeded(seed)
    condition = random_condition(rng, 3)
    values = np.array([[rng.randint(0, 16) / 8 for _ in range(8)] for _ in "abcd"])
    program = compile_program([(condition, {n: i for i, n in enumerate("abcd")})])

    detect = {n: Selection(f"f{i}", 1.0) for i, n in enumerate("abcd")}
    rules, _ = alone(
        make_policy("p", condition, detect), {f"f{i}": v for i, v in enumerate(values)}
    )
    expected = score_text(rules, values.T, np.ones(8, bool), 0).evidence[:, 0]
    found = evidence(on_device(program, torch.device("cpu")), torch.from_numpy(values))[0]

    assert np.array_equal(expected, found.numpy())
    for t in range(8):
        selections = {n: bool(v[t] > 1) for n, v in zip("abcd", values, strict=True)}
        assert reference.holds(condition, selections) == (expected[t] > 1)


@given(
    st.floats(2**-20, 100, width=32),
    st.floats(2**-20, 100, width=32) | st.floats(2**-20, 100),
)
@settings(derandomize=True, deadline=None, max_examples=500)
def test_evidence_exceeds_1_where_the_share_exceeds_the_threshold(x: float, above: float) -> None:
    """Dividing by the threshold never moves a value across it."""
    for value in (x, above, np.nextafter(above, 0), np.nextafter(above, 200)):
        assert (value > above) == (np.float64(value) / above > 1)


@pytest.mark.parametrize(
    ("condition", "expected"),
    [
        (Name("a"), False),
        (Not(Name("a")), True),
        (Not(Not(Name("a"))), False),
        (And((Not(Name("a")), Not(Name("a")))), True),
        (Or((Name("a"), Name("a"))), False),
        (KOf(2, (Name("a"), Not(Name("a")), Not(Name("a")))), True),
    ],
)
def test_a_share_at_its_threshold_does_not_hold(condition: Name, *, expected: bool) -> None:
    """Thresholds are strict, so at equality the negation holds."""
    policy = make_policy("p", condition, {"a": Selection("f0", 0.6)})

    assert expected == (judge(policy, {"f0": np.array([0.6])}, 0).outcome == "match")


def test_a_window_longer_than_the_text_can_match() -> None:
    """`2 of 64 tokens` matches in a text of three."""
    policy = make_policy("p", Name("a"), {"a": Selection("f0", 0.5)}, window=Window(2, 64))

    verdict = judge(policy, {"f0": np.array([1.0, 0.0, 1.0])}, 0)

    assert (verdict.outcome, verdict.first_token) == ("match", 2)


def test_a_scope_without_tokens_is_not_evaluated() -> None:
    """A policy over the output says nothing of a text that has none."""
    policy = make_policy("p", Name("a"), {"a": Selection("f0", 0.5)}, scope="output")

    verdict = judge(policy, {"f0": np.array([1.0, 1.0])}, 2)

    assert (verdict.outcome, verdict.score) == ("not_evaluated", None)
    assert verdict.features == {}


def test_an_error_is_not_folded_into_no_match() -> None:
    """A text of which one token could not be read is an error, unless it matched elsewhere."""
    policy = make_policy("p", Name("a"), {"a": Selection("f0", 0.5)})
    watchlist = make_watchlist([policy])
    quiet = np.zeros((3, FEATURES), np.float32)
    quiet[1] = np.nan
    loud = quiet.copy()
    loud[2, 0] = 1.0
    every = np.ones(3, bool)

    assert judge_text(watchlist.rules, quiet, every, 0)[0].outcome == "error"
    assert judge_text(watchlist.rules, loud, every, 0)[0].outcome == "match"


def test_a_negation_does_not_hold_on_nan() -> None:
    """What could not be read supports nothing, not even `not a`."""
    policy = make_policy("p", Not(Name("a")), {"a": Selection("f0", 0.5)})
    watchlist = make_watchlist([policy])

    verdict = judge_text(
        watchlist.rules, np.full((1, FEATURES), np.nan, np.float32), np.ones(1, bool), 0
    )

    assert (verdict[0].outcome, verdict[0].score) == ("error", None)


def test_window_score_is_the_kth_largest() -> None:
    """Positions before the text count as nothing."""
    scores = window_score(np.array([3.0, 1.0, 2.0]), 2, 2)

    assert np.array_equal([-np.inf, 1.0, 1.0], scores)


def test_keep_extends_a_match() -> None:
    """`keep: 2` stays on for two further tokens."""
    on = on_tokens(np.array([False, True, False, False, False]), 2)

    assert on.tolist() == [False, True, True, True, False]


def test_the_strongest_action_wins_and_ties_are_listed() -> None:
    """Verdicts in shadow do not act."""
    policies = [
        make_policy("a", Name("a"), {"a": Selection("f0", 0.5)}),
        make_policy("b", Name("a"), {"a": Selection("f0", 0.5)}),
        make_policy("c", Name("a"), {"a": Selection("f0", 0.5)}, mode="shadow"),
        make_policy("d", Name("a"), {"a": Selection("f0", 9.0)}),
    ]
    verdicts = [judge(p, {"f0": np.array([1.0])}, 0) for p in policies]

    assert [v.policy for v in strongest(verdicts)] == ["a", "b"]
