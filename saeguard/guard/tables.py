"""The tables that the compiled loops read, and the numbers that stand for kinds of things."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

FATES = 6
EVALUATED, SPECIAL, CACHED, ERROR, UNTRACKED, MASSIVE = range(FATES)
"""What became of a token: evaluated, or skipped by reason."""
TOKEN, MEAN, MAX, AVERAGE, PEAK, WHOLE = range(6)
"""Kinds of traces: a token's own share, or an aggregate."""
WINDOW, COUNT, LAST = range(3)
"""Kinds of `for`: k of n tokens, k tokens in the request, the last token."""
LEAF, NEGATED, LEAST, MOST, POINTS = range(5)
"""Kinds of nodes of a condition."""
RESTLESS, AWAKE, UNSETTLED = range(3)
"""Lists of a slot: aggregates that are not at rest, policies that the next token concerns whatever
it is, and terms whose first quiet token is still to come."""
FEATURES, TRACES, POLICIES = range(3)
"""Lists of a token: what it moves away from rest."""

THRESHOLD = 1.0
JUST_ABOVE_1 = 1.0 + 2.0**-52
FOREVER = 2**31 - 1
FADED = 2.0**-149
"""An average below the smallest float32 is 0: then it is at rest."""


FEATURE = np.dtype([("rest", "f8"), ("first", "i4"), ("end", "i4")])
"""Share at rest, and its traces among the links."""
TRACE = np.dtype(
    [
        ("rest", "f8"),
        ("decay", "f8"),  # of an average: what is left of a value one token later
        ("kind", "i4"),
        ("feature", "i4"),
        ("scope", "i4"),  # of an aggregate; -1 for a share
        ("n", "i4"),
        ("aggregate", "i4"),  # index among the aggregates
        ("first_kept", "i4"),  # where its ring begins
        ("first_term", "i4"),
        ("end_term", "i4"),
        ("first_policy", "i4"),
        ("end_policy", "i4"),
    ]
)
POLICY = np.dtype(
    [
        ("rest", "f8"),  # evidence while all its traces are at rest
        ("scope", "i4"),
        ("kind", "i4"),
        ("k", "i4"),
        ("n", "i4"),
        ("keep", "i4"),
        ("window", "i4"),  # index among the windows, -1 for others than `k of n`
        ("first_kept", "i4"),
        ("first_node", "i4"),
        ("end_node", "i4"),
    ]
)
NODE = np.dtype(
    [
        ("above", "f8"),
        ("op", "i4"),
        ("trace", "i4"),
        ("k", "i4"),
        ("first", "i4"),  # its terms among the links: pairs of node and points
        ("end", "i4"),
    ]
)
TERM = np.dtype([("above", "f8"), ("trace", "i4"), ("scope", "i4")])
WINDOW_OF = np.dtype([("scope", "i4"), ("k", "i4"), ("n", "i4")])


class Tables(NamedTuple):
    """The rules; `saeguard.guard.compiled_rules` fills them."""

    looks: np.ndarray
    """[roles, scopes] bool: whether the scope looks at the role."""
    features: np.ndarray
    """[features] FEATURE."""
    traces: np.ndarray
    """[traces] TRACE."""
    policies: np.ndarray
    """[policies] POLICY."""
    nodes: np.ndarray
    """[nodes] NODE."""
    links: np.ndarray
    """Lists of indices, one after the other; records say where theirs begin and end."""
    terms: np.ndarray
    """The distinct triples of trace, threshold and scope; verdicts report how each fired."""
    windows: np.ndarray
    """The distinct `k of n tokens` of each scope."""
    restless: np.ndarray
    """The traces whose value changes while their feature is at rest."""
    awake: np.ndarray
    """The policies that match while everything is at rest."""
    on_error: np.ndarray
    """The policies that stop a request if a token could not be read."""


class Scratch(NamedTuple):
    """What a token needs for itself; afterwards everything is at rest again."""

    shares: np.ndarray
    """[features] float64."""
    values: np.ndarray
    """[traces] float64."""
    nodes: np.ndarray
    """[nodes of the largest condition] float64."""
    window: np.ndarray
    """[longest window] float64."""
    lists: np.ndarray
    """[3, most] int64: FEATURES, TRACES and POLICIES."""
    marked: np.ndarray
    """[3, most] bool: whether it is in the list."""
    evidence: np.ndarray
    """[P] float64 of the policies that were evaluated; empty if it is not asked for."""
    scores: np.ndarray
    """[P] float64 of the policies that were evaluated; empty if they are not asked for."""
    compared: np.ndarray
    """[traces] float64 values that were compared; empty if they are not asked for."""
