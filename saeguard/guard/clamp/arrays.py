"""The rules of clamp policies as arrays, which torch evaluates inside the forward pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from saeguard.guard.clamp.condition_program import Program, compile_program
from saeguard.guard.scopes import SCOPES
from saeguard.policy.types import Aggregate, Over, Policy, Scope


class Aggregates(NamedTuple):
    """The aggregates of `over`: those of a window first, then averages, then maxima so far."""

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


class Windowed(NamedTuple):
    """Policies with `for: k of n tokens` where n is above 1."""

    groups: tuple[tuple[int, int, np.ndarray], ...]
    """(k, n, indices among all policies)."""
    longest: int
    """Largest n, 1 without such a policy."""


class ClampArrays(NamedTuple):
    """The rules of the clamp policies of one layer, in their order."""

    aggregates: Aggregates
    trace: np.ndarray
    """[selections] the compared value: a feature, or the number of features + an aggregate."""
    above: np.ndarray
    """[selections, 1] float64 threshold."""
    program: Program
    scope: np.ndarray
    """[P] index into `SCOPES`."""
    windowed: Windowed


def clamp_arrays(policies: Sequence[Policy], column: Mapping[str, int]) -> ClampArrays:
    """Compile clamp policies to arrays.

    Args:
        policies: in their order among the layer's clamps.
        column: `feature_set/feature` -> its column among the shares.
    """
    over = _aggregates(policies, column)
    aggregate_of = {key: len(column) + i for i, key in enumerate(over)}
    selections: dict[tuple[int, float], int] = {}
    conditions = []
    for policy in policies:
        names = {}
        for name, selection in policy.detect.items():
            feature = column[f"{policy.feature_set}/{selection.feature}"]
            trace = aggregate_of.get((selection.over, feature, policy.scope), feature)
            names[name] = selections.setdefault((trace, selection.above), len(selections))
        conditions.append((policy.condition, names))
    return ClampArrays(
        aggregates=_columns_of(list(over)),
        trace=np.array([trace for trace, _ in selections], np.intp),
        above=np.array([[above] for _, above in selections], np.float64).reshape(-1, 1),
        program=compile_program(conditions),
        scope=np.array([SCOPES.index(p.scope) for p in policies], np.intp),
        windowed=_windowed(policies),
    )


AggregateKey = tuple[Over, int, Scope]


def _aggregates(policies: Sequence[Policy], column: Mapping[str, int]) -> dict[AggregateKey, None]:
    """Return the distinct aggregates, sorted by kind and length."""
    kinds: tuple[Aggregate, ...] = ("mean", "max", "average", "peak")
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
    )


def _windowed(policies: Sequence[Policy]) -> Windowed:
    windows = [(p.window.k, p.window.n) for p in policies]
    lengths = {(k, n) for k, n in windows if n is not None and n > 1}
    groups = tuple(
        (k, n, np.array([i for i, w in enumerate(windows) if w == (k, n)], np.intp))
        for k, n in sorted(lengths)
    )
    return Windowed(groups, max((n for _, n, _ in groups), default=1))
