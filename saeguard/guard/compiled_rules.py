"""The policies' rules as arrays: features, selections, aggregates, conditions, windows.

A step evaluates them with array operations, without a Python loop over policies.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from saeguard.errors import InputError
from saeguard.guard.condition_program import Program, compile_program
from saeguard.guard.scopes import BY_ROLE, SCOPES
from saeguard.policy.types import Aggregate, Over, Policy, Scope

MAX_NODES = 1_000_000
"""Selections and parts of conditions over all policies."""


class RulesError(InputError):
    """The policies' conditions have too many parts."""


class Aggregates(NamedTuple):
    """The aggregates of `over`: those of a window first, then averages, maxima and means so far."""

    feature: np.ndarray
    """[A] feature column."""
    scope: np.ndarray
    """[A] index into `SCOPES`; tokens outside the scope do not count."""
    missing: np.ndarray
    """[A] value of a token that does not count: 0 in a sum, -inf in a maximum."""
    windows: tuple[tuple[Aggregate, int, slice], ...]
    """(`mean` or `max`, tokens of the window, the aggregates of that kind and length)."""
    longest: int
    """Tokens of the longest window, 0 without any."""
    average: slice
    """The averages with a half-life."""
    decay: np.ndarray
    """[averages] the fraction of a value that is left one token later, `2 ** (-1 / half-life)`."""
    peak: slice
    """The maxima over the request so far."""
    whole: slice
    """The means over the request so far."""


class Windowed(NamedTuple):
    """Policies with `for: k of n tokens` where n is above 1."""

    policy: np.ndarray
    """Their indices among all policies."""
    groups: tuple[tuple[int, int, np.ndarray], ...]
    """(k, n, indices into `policy`)."""
    longest: int
    """Largest n, 1 without such a policy."""


class Counted(NamedTuple):
    """Policies with `for: k tokens in the request`."""

    policy: np.ndarray
    """Their indices among all policies."""
    k: np.ndarray


class Last(NamedTuple):
    """Policies with `for: the last token`."""

    policy: np.ndarray
    """Their indices among all policies."""
    scope: np.ndarray
    """Index into `SCOPES` of each."""


class Terms(NamedTuple):
    """The distinct pairs of selection and scope; verdicts report how often each one fired."""

    trace: np.ndarray
    """[Q] the compared value, see `Rules.trace`."""
    above: np.ndarray
    """[Q] float64 threshold."""
    scope: np.ndarray
    """[Q] index into `SCOPES`."""
    of: np.ndarray
    """[selections of all policies] term of each selection, policy by policy, in `detect` order."""
    start: np.ndarray
    """[P + 1] first entry of each policy in `of`."""

    def of_policy(self, i: int) -> list[int]:
        """Return the term of each selection of policy `i`, in `detect` order."""
        found: list[int] = self.of[self.start[i] : self.start[i + 1]].tolist()
        return found


class Rules(NamedTuple):
    """The compiled policies, in the watch list's order."""

    policies: tuple[Policy, ...]
    features: int
    """Number of features."""
    aggregates: Aggregates
    trace: np.ndarray
    """[selections] the compared value: a feature, or `features` + the index of an aggregate."""
    above: np.ndarray
    """[selections, 1] float64 threshold."""
    program: Program
    scope: np.ndarray
    """[P] index into `SCOPES`."""
    keep: np.ndarray
    """[P] number of tokens for which a match keeps the policy on."""
    windowed: Windowed
    counted: Counted
    last: Last
    terms: Terms
    sampled: bool
    """Whether some policy looks at a sample of the requests only."""
    clamps: np.ndarray
    """[P] bool: the policy's action is a clamp, which the device carries out."""
    approximate: tuple[bool, ...]
    """[P] whether the policy reads a latent by a fixed threshold that replaces its rank."""
    by_role: bool
    """Whether some policy needs the role of each prompt token."""


def compile_rules(
    policies: Sequence[Policy], column: Mapping[str, int], approximate: Collection[str] = ()
) -> Rules:
    """Compile policies to arrays.

    Args:
        policies: in the watch list's order.
        column: `feature_set/feature` -> its column among the shares.
        approximate: the features whose latents fire by fixed thresholds in place of ranks.

    Raises:
        RulesError: the conditions have too many parts.
    """
    over = _aggregates(policies, column)
    aggregate_of = {key: len(column) + i for i, key in enumerate(over)}
    selections: dict[tuple[int, float], int] = {}
    terms: dict[tuple[int, float, int], int] = {}
    conditions, of_terms, start = [], [], [0]
    for policy in policies:
        names = {}
        for name, selection in policy.detect.items():
            feature = column[f"{policy.feature_set}/{selection.feature}"]
            trace = aggregate_of.get((selection.over, feature, policy.scope), feature)
            names[name] = selections.setdefault((trace, selection.above), len(selections))
            term = (trace, selection.above, SCOPES.index(policy.scope))
            of_terms.append(terms.setdefault(term, len(terms)))
        conditions.append((policy.condition, names))
        start.append(len(of_terms))
    program = compile_program(conditions)
    if program.size > MAX_NODES:
        raise RulesError(
            f"the policies' conditions have {program.size:,} parts in all, at most {MAX_NODES:,} "
            "are allowed; load fewer policies, or split them over several servers"
        )
    return Rules(
        policies=tuple(policies),
        features=len(column),
        aggregates=_columns_of(list(over)),
        trace=np.array([trace for trace, _ in selections], np.intp),
        above=np.array([[above] for _, above in selections], np.float64).reshape(-1, 1),
        program=program,
        scope=np.array([SCOPES.index(p.scope) for p in policies], np.intp),
        keep=np.array([p.keep for p in policies], np.int64),
        windowed=_windowed(policies),
        counted=_counted(policies),
        last=_last(policies),
        terms=Terms(
            np.array([trace for trace, _, _ in terms], np.intp),
            np.array([above for _, above, _ in terms], np.float64),
            np.array([scope for _, _, scope in terms], np.intp),
            np.array(of_terms, np.intp),
            np.array(start, np.intp),
        ),
        sampled=any(p.sample < 1 for p in policies),
        clamps=np.array([p.action == "clamp" for p in policies], bool),
        approximate=tuple(
            any(f"{p.feature_set}/{name}" in approximate for name in _read_by(p)) for p in policies
        ),
        by_role=any(p.scope in BY_ROLE for p in policies),
    )


def _read_by(policy: Policy) -> list[str]:
    clamped = policy.clamp.features if policy.clamp else ()
    return [*(s.feature for s in policy.detect.values()), *clamped]


AggregateKey = tuple[Over, int, Scope]


def _aggregates(policies: Sequence[Policy], column: Mapping[str, int]) -> dict[AggregateKey, None]:
    """Return the distinct aggregates, sorted by kind and length."""
    kinds: tuple[Aggregate, ...] = ("mean", "max", "average", "peak", "whole")
    found = {
        (s.over, column[f"{policy.feature_set}/{s.feature}"], policy.scope)
        for policy in policies
        for s in policy.detect.values()
        if s.over.kind != "token"
    }
    return dict.fromkeys(
        sorted(found, key=lambda a: (kinds.index(a[0].kind), a[0].n, a[1], SCOPES.index(a[2])))
    )


def _columns_of(keys: Sequence[AggregateKey]) -> Aggregates:
    def where(kind: Aggregate, n: int | None = None) -> slice:
        at = [i for i, (o, _, _) in enumerate(keys) if o.kind == kind and n in (None, o.n)]
        return slice(at[0], at[-1] + 1) if at else slice(0, 0)

    lengths = sorted({(o.kind, o.n) for o, _, _ in keys if o.kind in ("mean", "max")})
    average = where("average")
    return Aggregates(
        feature=np.array([feature for _, feature, _ in keys], np.intp),
        scope=np.array([SCOPES.index(scope) for _, _, scope in keys], np.intp),
        missing=np.array([-np.inf if o.kind in ("max", "peak") else 0.0 for o, _, _ in keys]),
        windows=tuple((kind, n, where(kind, n)) for kind, n in lengths),
        longest=max((n for _, n in lengths), default=0),
        average=average,
        decay=np.array([0.5 ** (1 / o.n) for o, _, _ in keys[average]], np.float64),
        peak=where("peak"),
        whole=where("whole"),
    )


def _windowed(policies: Sequence[Policy]) -> Windowed:
    at = [i for i, p in enumerate(policies) if p.window.n is not None and p.window.n > 1]
    windows = [(policies[i].window.k, policies[i].window.n or 0) for i in at]
    return Windowed(
        np.array(at, np.intp),
        tuple(
            (k, n, np.array([j for j, w in enumerate(windows) if w == (k, n)], np.intp))
            for k, n in sorted(set(windows))
        ),
        max((n for _, n in windows), default=1),
    )


def _counted(policies: Sequence[Policy]) -> Counted:
    at = [i for i, p in enumerate(policies) if p.window.n is None]
    return Counted(np.array(at, np.intp), np.array([policies[i].window.k for i in at], np.intp))


def _last(policies: Sequence[Policy]) -> Last:
    at = [i for i, p in enumerate(policies) if p.window.last]
    return Last(
        np.array(at, np.intp), np.array([SCOPES.index(policies[i].scope) for i in at], np.intp)
    )


def is_sampled(policy: Policy, request_id: str) -> bool:
    """Return whether the policy looks at a request; every process returns the same answer.

    A hash of the policy's id and the request's decides. So a policy's shadow and enforced variants
    look at the same requests, and other policies at other requests.
    """
    if policy.sample >= 1:
        return True
    found = hashlib.sha256(f"{policy.id}\n{request_id}".encode()).digest()
    return int.from_bytes(found[:8]) < policy.sample * 2**64
