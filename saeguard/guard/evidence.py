"""The evidence of a policy's condition at one token; see `saeguard.guard.conditions`."""

from __future__ import annotations

import numpy as np

from saeguard.guard.compiled import compiled
from saeguard.guard.tables import (
    JUST_ABOVE_1,
    LEAF,
    LEAST,
    NEGATED,
    POINTS,
    THRESHOLD,
    Scratch,
    Tables,
)


@compiled
def evidence(rules: Tables, x: Scratch, p: int) -> float:
    """Return the evidence of a policy's condition."""
    first, end = rules.policies[p]["first_node"], rules.policies[p]["end_node"]
    value = 0.0
    for at in range(first, end):
        node = rules.nodes[at]
        op = node["op"]
        if op == LEAF:
            value = x.values[node["trace"]] / node["above"]
        elif op == NEGATED:
            value = x.values[node["trace"]] / node["above"]
            # At 1 the selection does not hold, so its negation must.
            value = 2.0 - value if value > THRESHOLD else max(2.0 - value, JUST_ABOVE_1)
        elif op == POINTS:
            value = points(rules, x, at)
        else:
            value = x.nodes[rules.links[node["first"]]]
            for link in range(node["first"] + 2, node["end"], 2):
                other = x.nodes[rules.links[link]]
                if (other < value) if op == LEAST else (other > value):
                    value = other
        x.nodes[at - first] = value
    return value


@compiled
def points(rules: Tables, x: Scratch, at: int) -> float:
    """Return the largest value that terms of at least `k` points in all reach."""
    node, highest = rules.nodes[at], -np.inf
    for link in range(node["first"], node["end"], 2):
        value, reached = x.nodes[rules.links[link]], 0
        for other in range(node["first"], node["end"], 2):
            if x.nodes[rules.links[other]] >= value:
                reached += rules.links[other + 1]
        if reached >= node["k"]:
            highest = max(highest, value)
    return highest


@compiled
def rest_evidence(rules: Tables, x: Scratch, out: np.ndarray) -> None:
    """Write the evidence of each policy while everything is at rest to `out` [P]."""
    for p in range(len(rules.policies)):
        out[p] = evidence(rules, x, p)
