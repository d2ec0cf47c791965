"""Conditions: `shell and untrusted`, `2 of (a, b, c)`, `5 points of (3 for a, 2 for b)`.

Grammar, where `and` and `or` never stand beside each other without parentheses:

    condition = term ("and" term)* | term ("or" term)*
    term      = "not" term | "(" condition ")" | name
              | count "of" "(" condition ("," condition)* ")"
              | number "points" "of" "(" given ("," given)* ")"
    count     = number | "any" | "all"
    given     = number "for" term
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import product

from saeguard.errors import InputError
from saeguard.policy.types import And, Expr, KOf, Name, Not, Or, Points
from saeguard.yaml_files.codes import Code
from saeguard.yaml_files.findings import did_you_mean, show

MAX_TOKENS = 200
MAX_NESTING = 12
MAX_ENUMERATED = 10
MAX_POINTS = 100

NAME = r"[a-z][a-z0-9_]*"
SIGNS = {"&": "and", "|": "or", "!": "not", "~": "not"}
"""What other languages write for our words."""
RESERVED = frozenset({"and", "or", "not", "of", "any", "all", "points", "for"})
_TOKEN = re.compile(r"[A-Za-z0-9_]+|[(),]|\S")


class ConditionError(InputError):
    """A mistake in a condition.

    Attributes:
        code: the kind of mistake.
        offset: of the mistake in the text, in characters.
    """

    def __init__(self, code: Code, message: str, offset: int) -> None:
        super().__init__(message)
        self.code: Code = code
        self.offset = offset


@dataclass(frozen=True, slots=True)
class Condition:
    """A condition, and the offset of each of its names in the text."""

    expr: Expr
    names: Mapping[str, int]
    """Offset of the first mention of each selection, in order of mention."""


def parse(text: str) -> Condition:
    """Read a condition.

    Raises:
        ConditionError: the first mistake.
    """
    tokens = [(m.group(), m.start()) for m in _TOKEN.finditer(text)]
    if len(tokens) > MAX_TOKENS:
        message = f"the condition is longer than {MAX_TOKENS} words and signs; split the policy"
        raise ConditionError("condition-size", message, tokens[MAX_TOKENS][1])
    parser = _Parser([*tokens, ("", len(text.rstrip()))])
    expr = parser.condition(0)
    parser.expect("", '"and", "or" or the end')
    return Condition(expr, parser.names)


def holds(expr: Expr, selections: Collection[str]) -> bool:
    """Return whether the condition holds if exactly `selections` do."""
    match expr:
        case Name(name):
            return name in selections
        case Not(term):
            return not holds(term, selections)
        case And(terms):
            return all(holds(term, selections) for term in terms)
        case Or(terms):
            return any(holds(term, selections) for term in terms)
        case KOf(k, terms):
            return sum(holds(term, selections) for term in terms) >= k
        case Points(k, given):
            return sum(points for points, term in given if holds(term, selections)) >= k


def never_holds(condition: Condition) -> bool:
    """Return whether no combination of selections makes the condition hold.

    Without `not` the condition holds if every selection does, which is tried first. With more
    than `MAX_ENUMERATED` names no contradiction is looked for.
    """
    names = list(condition.names)
    if len(names) > MAX_ENUMERATED or holds(condition.expr, names):
        return False
    switches = product((False, True), repeat=len(names))
    return not any(
        holds(condition.expr, {n for n, on in zip(names, switch, strict=True) if on})
        for switch in switches
    )


def terms_of(expr: Expr) -> Iterator[Expr]:
    """Yield the expression and everything in it."""
    yield expr
    match expr:
        case Name():
            return
        case Not(term):
            yield from terms_of(term)
        case And(terms) | Or(terms) | KOf(_, terms):
            for term in terms:
                yield from terms_of(term)
        case Points(_, given):
            for _points, term in given:
                yield from terms_of(term)


@dataclass(slots=True)
class _Parser:
    tokens: list[tuple[str, int]]
    at: int = 0
    names: dict[str, int] = field(default_factory=dict)

    def take(self) -> tuple[str, int]:
        token = self.tokens[self.at]
        self.at += 1
        return token

    def peek(self) -> str:
        return self.tokens[self.at][0]

    def expect(self, wanted: str, allowed: str) -> None:
        found, offset = self.tokens[self.at]
        if found != wanted:
            raise self.unexpected(found, offset, allowed)
        self.at += 1

    def unexpected(self, found: str, offset: int, allowed: str) -> ConditionError:
        what = f"found {show(found)}" if found else "the condition ends here"
        hint = did_you_mean(found.lower(), RESERVED) if found.isalpha() else ""
        if found in SIGNS:
            hint = f'write "{SIGNS[found]}"; '
        return ConditionError("condition-syntax", f"{what}; {hint}expected {allowed}", offset)

    def condition(self, depth: int) -> Expr:
        if depth > MAX_NESTING:
            message = f"parentheses are nested more than {MAX_NESTING} deep; split the policy"
            raise ConditionError("condition-size", message, self.tokens[self.at][1])
        terms = [self.term(depth)]
        joint = self.peek()
        while self.peek() in {"and", "or"}:
            word, offset = self.take()
            if word != joint:
                message = (
                    '"and" and "or" stand side by side; put parentheses around the part that '
                    "belongs together"
                )
                raise ConditionError("condition-mixed", message, offset)
            terms.append(self.term(depth))
        if len(terms) == 1:
            return terms[0]
        return And(tuple(terms)) if joint == "and" else Or(tuple(terms))

    def term(self, depth: int) -> Expr:
        word, offset = self.take()
        if word == "not":
            if depth > MAX_NESTING:
                raise ConditionError("condition-size", 'too many "not" in a row', offset)
            return Not(self.term(depth + 1))
        if word == "(":
            expr = self.condition(depth + 1)
            self.expect(")", '"and", "or" or ")"')
            return expr
        if word in {"any", "all"} or (word.isascii() and word.isdecimal()):
            return self.count(word, offset, depth)
        if word in RESERVED or not re.fullmatch(NAME, word):
            allowed = 'the name of a selection, "not", "(" or a count such as "2 of ("'
            raise self.unexpected(word, offset, allowed)
        self.names.setdefault(word, offset)
        return Name(word)

    def count(self, word: str, offset: int, depth: int) -> Expr:
        if self.peek() == "points" and word not in {"any", "all"}:
            self.take()
            return self.points(word, offset, depth)
        self.expect("of", f'"of", as in {show(word + " of (a, b)")}')
        self.expect("(", f'"(", as in {show(word + " of (a, b)")}')
        terms: list[Expr] = []
        while not terms or self.peek() == ",":
            if terms:
                self.take()
            term_offset = self.tokens[self.at][1]
            term = self.condition(depth + 1)
            if term in terms:
                message = "found this entry twice, and it would count twice; remove one"
                raise ConditionError("condition-count", message, term_offset)
            terms.append(term)
        self.expect(")", '",", "and", "or" or ")"')
        if word == "any":
            return Or(tuple(terms)) if len(terms) > 1 else terms[0]
        if word == "all":
            return And(tuple(terms)) if len(terms) > 1 else terms[0]
        k = int(word[:9])
        if not 1 <= k <= len(terms):
            message = f"found {word} of {len(terms)}; write a number from 1 to {len(terms)}"
            raise ConditionError("condition-count", message, offset)
        return KOf(k, tuple(terms))

    def points(self, word: str, offset: int, depth: int) -> Expr:
        example = show(f"{word} points of (3 for a, 2 for b)")
        self.expect("of", f'"of", as in {example}')
        self.expect("(", f'"(", as in {example}')
        given: list[tuple[int, Expr]] = []
        while not given or self.peek() == ",":
            if given:
                self.take()
            number, at = self.take()
            if not (number.isascii() and number.isdecimal()):
                raise self.unexpected(number, at, f"a number of points, as in {example}")
            if not 1 <= int(number[:9]) <= MAX_POINTS:
                message = f"found {number} points; write a number from 1 to {MAX_POINTS}"
                raise ConditionError("condition-count", message, at)
            self.expect("for", f'"for", as in {example}')
            term_offset = self.tokens[self.at][1]
            term = self.term(depth + 1)
            if term in [other for _, other in given]:
                message = "found this entry twice; give it its points once"
                raise ConditionError("condition-count", message, term_offset)
            given.append((int(number), term))
        self.expect(")", '"," or ")"')
        total = sum(points for points, _ in given)
        k = int(word[:9])
        if not 1 <= k <= total:
            message = f"found {word} of {total} points; write a number from 1 to {total}"
            raise ConditionError("condition-count", message, offset)
        return Points(k, tuple(given))
