"""A policy after it has been read and checked: plain, frozen data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Literal, TypeAlias

Severity: TypeAlias = Literal["low", "medium", "high", "critical"]
Mode: TypeAlias = Literal["shadow", "enforce"]
Action: TypeAlias = Literal["log", "flag", "clamp", "stop"]
OnError: TypeAlias = Literal["allow", "stop"]
Uncached: TypeAlias = Literal["count", "recompute"]
Scope: TypeAlias = Literal["prompt", "output", "both", "assistant", "user", "system", "tool"]
Aggregate: TypeAlias = Literal["token", "mean", "max", "average", "peak", "whole"]
Edit: TypeAlias = Literal["to", "activation", "scale", "ablate", "at_most"]
When: TypeAlias = Literal["matched", "rest", "always"]

ACTIONS: tuple[Action, ...] = ("log", "flag", "clamp", "stop")
"""Weakest first; the strongest matching action wins."""


def strongest_action(actions: Iterable[Action | None]) -> Action | None:
    """Return the strongest of some actions, None if there are none."""
    return max((a for a in actions if a is not None), key=ACTIONS.index, default=None)


@dataclass(frozen=True, slots=True)
class Name:
    """A named selection."""

    name: str


@dataclass(frozen=True, slots=True)
class Not:
    """True if `term` is not."""

    term: Expr


@dataclass(frozen=True, slots=True)
class And:
    """True if every term is."""

    terms: tuple[Expr, ...]


@dataclass(frozen=True, slots=True)
class Or:
    """True if any term is."""

    terms: tuple[Expr, ...]


@dataclass(frozen=True, slots=True)
class KOf:
    """True if at least `k` terms are."""

    k: int
    terms: tuple[Expr, ...]


@dataclass(frozen=True, slots=True)
class Points:
    """True if the points of the terms that are true add up to at least `k`."""

    k: int
    terms: tuple[tuple[int, Expr], ...]
    """Each term with its points."""


Expr: TypeAlias = Name | Not | And | Or | KOf | Points


@dataclass(frozen=True, slots=True)
class Over:
    """How shares are aggregated before they are compared: one token's own, or several tokens'."""

    kind: Aggregate = "token"
    """`mean` and `max` of the last `n` tokens, `average` with half-life `n`; of all tokens so far
    `peak`, their maximum, and `whole`, their mean."""
    n: int = 1


@dataclass(frozen=True, slots=True)
class Selection:
    """`share(feature) > above` at one token; strict."""

    feature: str
    above: float
    over: Over = Over()


@dataclass(frozen=True, slots=True)
class Window:
    """Match at a token when at least `k` of the last `n` token positions hold."""

    k: int = 1
    n: int | None = 1
    """None: of all tokens of the request so far."""
    last: bool = False
    """Match when the condition holds at the last token in scope; known when the request ends."""


@dataclass(frozen=True, slots=True)
class Clamp:
    """Edit the clamp latents of `features`."""

    features: tuple[str, ...]
    amount: float
    """A share of the calibrated range for `to` and `at_most`, an activation for `activation`,
    a factor for `scale`; 0 for `ablate`."""
    how: Edit = "to"
    when: When = "rest"


@dataclass(frozen=True, slots=True)
class Exception_:  # noqa: N801 - the policy language calls it an exception
    """A tenant for which the policy's action is waived until `expires`."""

    id: str
    reason: str
    owner: str
    expires: date
    tenant: str


@dataclass(frozen=True, slots=True)
class Policy:
    """One behaviour to watch, its condition and its action."""

    id: str
    title: str
    owner: str
    severity: Severity
    mode: Mode
    action: Action
    on_error: OnError
    scope: Scope
    uncached: Uncached
    """What happens to cached tokens that were not evaluated: counted, or computed again."""
    feature_set: str
    rationale: str
    falsepositives: tuple[str, ...]
    review_by: date | None
    detect: Mapping[str, Selection]
    condition: Expr
    window: Window
    keep: int
    """Tokens for which a match stays on after its last match (hysteresis)."""
    clamp: Clamp | None
    exceptions: tuple[Exception_, ...]
    path: Path
    digest: str
    """sha256 of the canonical content, so that comments and layout do not matter."""
    sample: float = 1.0
    """The share of requests that are looked at."""
    message: str | None = None
    """What a client reads in place of the text if the policy stops a request."""
    accept_weak: str | None = None
    """Why the policy may be enforced although its features were measured to be of no use."""
