"""Conditions without `not`: minima, maxima and points of selections and negated selections.

A selection's evidence is `share / above`, so the selection holds if its evidence exceeds 1.
Conditions follow Zadeh's min-max logic (Zadeh 1965, Fuzzy sets): `and` is the minimum, `or` the
maximum, `k of` the k-th largest, `not x` is `2 - x`. `k points of` is the k-th largest of as many
copies of each term as it has points. Every condition holds exactly if its evidence exceeds 1; below
that, the evidence measures the distance, which a ROC curve needs.

`not` is moved down to the selections (De Morgan), which leaves minima, maxima and points of earlier
results. Evidence is float64, so that `x / a > 1` agrees with `x > a` for every pair of float32
values.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from saeguard.policy.types import And, Expr, KOf, Name, Not, Or, Points

JUST_ABOVE_1 = 1.0 + sys.float_info.epsilon
"""Least evidence of the negation of a selection that does not hold: at 1 it must hold."""

Op: TypeAlias = Literal["min", "max", "points"]

Node: TypeAlias = tuple[Any, ...]
"""(selection, negated), or (op, k, ((points, node), ...))."""


@dataclass(slots=True)
class Nodes:
    """Collects the distinct nodes of conditions, with the depth of each."""

    level: dict[Node, int] = field(default_factory=dict)
    number: dict[Node, int] = field(default_factory=dict)
    """By node: how many were there before it; its terms have lower numbers."""

    def add(self, expr: Expr, names: Mapping[str, int], *, negate: bool = False) -> Node:
        """Add a condition and its parts.

        Args:
            expr: the condition.
            names: the index of each selection that it names.
            negate: add its negation instead.
        """
        match expr:
            case Name(name):
                return self._keep((names[name], negate), 0)
            case Not(term):
                return self.add(term, names, negate=not negate)
            case And(terms):
                return self._several(len(terms), [(1, t) for t in terms], names, negate=negate)
            case Or(terms):
                return self._several(1, [(1, t) for t in terms], names, negate=negate)
            case KOf(k, terms):
                return self._several(k, [(1, t) for t in terms], names, negate=negate)
            case Points(k, given):
                return self._several(k, given, names, negate=negate)

    def _several(
        self,
        k: int,
        given: Sequence[tuple[int, Expr]],
        names: Mapping[str, int],
        *,
        negate: bool,
    ) -> Node:
        """Add a node that holds if terms of `k` points in all hold; with `negate`, its negation."""
        total = sum(points for points, _ in given)
        if negate:
            k = total - k + 1
        terms = sorted(
            ((points, self.add(term, names, negate=negate)) for points, term in given),
            key=lambda term: (self.number[term[1]], term[0]),
        )
        if k <= min(points for points, _ in terms):
            op: Op = "max"
        elif k > total - min(points for points, _ in terms):
            op = "min"
        else:
            op = "points"
        if op != "points":
            distinct = tuple(dict.fromkeys((1, node) for _, node in terms))
            if len(distinct) == 1:
                return distinct[0][1]
            return self._keep((op, 0, distinct), 1 + max(self.level[n] for _, n in distinct))
        return self._keep((op, k, tuple(terms)), 1 + max(self.level[n] for _, n in terms))

    def _keep(self, node: Node, level: int) -> Node:
        self.level.setdefault(node, level)
        self.number.setdefault(node, len(self.number))
        return node
