"""Conditions: what is read is what was written."""

from __future__ import annotations

import ast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from saeguard.policy.condition import ConditionError, holds, never_holds, parse
from saeguard.policy.types import And, Expr, KOf, Name, Not, Or, Points
from tests import reference

NAMES = ["a", "b", "c", "d"]


def grown(inner: st.SearchStrategy[Expr]) -> st.SearchStrategy[Expr]:
    """Return larger expressions made of smaller ones."""
    several = st.lists(inner, min_size=2, max_size=4, unique=True).map(tuple)
    return (
        inner.map(Not)
        | several.map(And)
        | several.map(Or)
        | several.flatmap(lambda terms: st.builds(KOf, st.integers(1, len(terms)), st.just(terms)))
        | several.flatmap(pointed)
    )


def pointed(terms: tuple[Expr, ...]) -> st.SearchStrategy[Expr]:
    """Return points for terms, and how many are needed."""
    points = st.lists(st.integers(1, 100), min_size=len(terms), max_size=len(terms))
    return points.flatmap(
        lambda given: st.builds(
            Points,
            st.integers(1, sum(given)),
            st.just(tuple(zip(given, terms, strict=True))),
        )
    )


EXPRESSIONS = st.recursive(st.sampled_from(NAMES).map(Name), grown, max_leaves=10)


def written(expr: Expr) -> str:
    """Write an expression with parentheses around everything that has parts."""
    match expr:
        case Name(name):
            return name
        case Not(term):
            return f"not ({written(term)})"
        case And(terms):
            return " and ".join(f"({written(term)})" for term in terms)
        case Or(terms):
            return " or ".join(f"({written(term)})" for term in terms)
        case KOf(k, terms):
            return f"{k} of ({', '.join(map(written, terms))})"
        case Points(k, given):
            parts = [f"{points} for ({written(term)})" for points, term in given]
            return f"{k} points of ({', '.join(parts)})"


@given(EXPRESSIONS)
def test_round_trip(expr: Expr) -> None:
    """Reading what was written gives the expression back."""
    assert parse(written(expr)).expr == expr


@given(EXPRESSIONS, st.sets(st.sampled_from(NAMES)))
def test_holds_as_the_reference(expr: Expr, on: set[str]) -> None:
    """Two independent evaluators agree."""
    assert holds(expr, on) == reference.holds(expr, {name: name in on for name in NAMES})


@given(
    st.lists(st.sampled_from(["not ", ""]), min_size=1, max_size=4),
    st.sampled_from([" and ", " or "]),
    st.sets(st.sampled_from(NAMES)),
)
def test_means_what_python_means(nots: list[str], joint: str, on: set[str]) -> None:
    """`and`, `or` and `not` bind as everybody expects."""
    text = joint.join(f"{prefix}{name}" for prefix, name in zip(nots, NAMES, strict=False))
    values = {name: name in on for name in NAMES}

    expected = eval(compile(ast.parse(text, mode="eval"), "", "eval"), values)  # noqa: S307

    assert holds(parse(text).expr, on) == expected


@pytest.mark.parametrize(
    ("text", "expr"),
    [
        ("a", Name("a")),
        ("not a", Not(Name("a"))),
        ("(a)", Name("a")),
        ("a and (b or c)", And((Name("a"), Or((Name("b"), Name("c")))))),
        ("2 of (a, b, c)", KOf(2, (Name("a"), Name("b"), Name("c")))),
        ("any of (a, b)", Or((Name("a"), Name("b")))),
        ("all of (a, b)", And((Name("a"), Name("b")))),
        ("any of (a)", Name("a")),
        (
            "2 of (a and b, not c, d)",
            KOf(2, (And((Name("a"), Name("b"))), Not(Name("c")), Name("d"))),
        ),
        (
            "4 points of (3 for a, 2 for not b, 1 for (a and b))",
            Points(4, ((3, Name("a")), (2, Not(Name("b"))), (1, And((Name("a"), Name("b")))))),
        ),
        ("not any of (a, b)", Not(Or((Name("a"), Name("b"))))),
        ("not a and b", And((Not(Name("a")), Name("b")))),
        ("nothing and order", And((Name("nothing"), Name("order")))),
    ],
)
def test_reads(text: str, expr: Expr) -> None:
    """Each form of the grammar gives its expression."""
    assert expr == parse(text).expr


@given(st.text(alphabet="ab ()12,notfrdpis", max_size=30) | st.text(max_size=20))
def test_errors_point_into_the_text(text: str) -> None:
    """A condition is read, or refused at an offset within it."""
    offset = 0
    try:
        parse(text)
    except ConditionError as error:
        offset = error.offset

    assert 0 <= offset <= len(text)


@given(EXPRESSIONS)
def test_never_holds(expr: Expr) -> None:
    """A contradiction is found exactly where every combination fails."""
    combinations = [{n for i, n in enumerate(NAMES) if bits >> i & 1} for bits in range(16)]

    assert never_holds(parse(written(expr))) == (not any(holds(expr, on) for on in combinations))


@pytest.mark.parametrize(
    ("text", "word"), [("a && b", "and"), ("a | b", "or"), ("!a and b", "not"), ("a or ~b", "not")]
)
def test_signs_of_other_languages(text: str, word: str) -> None:
    """The message says which word to write."""
    with pytest.raises(ConditionError, match=f'write "{word}"'):
        parse(text)
