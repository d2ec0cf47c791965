"""Compute the value of a feature at each token; only this module adds up latents.

Serving, recordings and calibration call these functions, so that a threshold that was measured on
recorded texts means the same in serving, to the last bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np

from saeguard.features.types import Term

Mix: TypeAlias = tuple[tuple[Any, Any], ...]
"""How latents make features: `(column, weight)` of the first latent of each feature, then of the
second latent of each feature that has one, and so on. Features are sorted by their number of
latents, largest first."""


def make_mix(parts: Sequence[Sequence[tuple[int, float]]]) -> Mix:
    """Return the mix of features, each given as (column, weight) of its latents.

    Args:
        parts: features with most latents first; none of them without a latent.
    """
    most = max(map(len, parts), default=0)
    return tuple(
        (np.array([c for c, _ in row], np.intp), np.array([w for _, w in row], np.float32))
        for j in range(most)
        for row in [[terms[j] for terms in parts if len(terms) > j]]
    )


def values_of(mix: Mix, f: Any) -> Any:
    """Return feature values `sum(weight * f)` [tokens, features] for activations `f`.

    NumPy arrays and torch tensors are added up in the same order, in float32.

    Args:
        mix: which columns of `f` make the features.
        f: [tokens, columns] float32.
    """
    value = None
    for column, weight in mix:
        part = f[:, column] * weight
        if value is None:
            value = part
        else:
            value[:, : len(column)] += part
    return value


def shares_of(mix: Mix, low: Any, span: Any, f: Any) -> Any:
    """Return feature shares [tokens, features]: values within each feature's calibrated range.

    Args:
        mix: which columns of `f` make the features.
        low: [features] float32 value at share 0.
        span: [features] float32 difference of the values at share 1 and share 0.
        f: [tokens, columns] float32.
    """
    return (values_of(mix, f) - low) / span


def share(value: np.ndarray, low: float, high: float) -> np.ndarray:
    """Return the shares of one feature's values, rounded as `shares_of` rounds them."""
    lowest, highest = np.float32(low), np.float32(high)
    out: np.ndarray = (value - lowest) / (highest - lowest)
    return out


def term_values(terms: Sequence[Term], f: np.ndarray) -> np.ndarray:
    """Return one feature's values [tokens] for `f` [tokens, terms], a column for each term."""
    if not terms:
        return np.zeros(len(f), np.float32)
    mix = make_mix([[(i, term.weight) for i, term in enumerate(terms)]])
    out: np.ndarray = values_of(mix, f)[:, 0]
    return out
