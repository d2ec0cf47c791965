"""Conditions as arithmetic: how strongly a token supports a policy.

A selection's evidence is `share / above`, so that it holds where the evidence exceeds 1.
Conditions follow Zadeh's min-max logic (Zadeh 1965, Fuzzy sets): `and` is the minimum,
`or` the maximum, `k of` the k-th largest, `not x` is `2 - x`. Whatever the condition, it holds
exactly where its evidence exceeds 1, and below that the evidence says how far off it was,
which is what a ROC curve needs.

The same functions run on NumPy arrays (rules on the host) and on torch tensors (clamps inside
the forward). Evidence is float64: `x / a > 1` then agrees with `x > a` for every pair of
float32 values.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from functools import reduce
from typing import Any

from saeguard.policy.types import And, Expr, KOf, Name, Not, Or

JUST_ABOVE_1 = 1.0 + sys.float_info.epsilon


def evidence(expr: Expr, selections: Mapping[str, Any], xp: Any) -> Any:
    """Return the evidence for `expr`, of the selections' shape.

    Args:
        expr: the condition.
        selections: evidence of each selection, float64 arrays of one shape.
        xp: `numpy` or `torch`; both spell the functions used here alike.
    """
    match expr:
        case Name(name):
            return selections[name]
        case And(terms):
            return reduce(xp.minimum, (evidence(t, selections, xp) for t in terms))
        case Or(terms):
            return reduce(xp.maximum, (evidence(t, selections, xp) for t in terms))
        case KOf(k, terms):
            stacked = xp.stack([evidence(t, selections, xp) for t in terms])
            return _kth_largest(stacked, k, xp)
        case Not(term):
            x = evidence(term, selections, xp)
            # At x == 1 the term does not hold, so its negation must: never return exactly 1.
            negated = 2.0 - x
            return xp.where(x > 1.0, negated, xp.where(negated > 1.0, negated, JUST_ABOVE_1))


def _kth_largest(stacked: Any, k: int, xp: Any) -> Any:
    """Return the k-th largest along the first axis."""
    if xp.__name__ == "torch":
        return stacked.topk(k, dim=0).values[-1]
    return xp.sort(stacked, axis=0)[-k]
