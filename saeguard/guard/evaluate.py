"""Evaluate the rules token by token, as plain loops; `saeguard.guard.judge` defines the semantics.

What a token costs follows what fires: latent -> features that add it up -> traces -> terms and
policies that compare them. All else is at rest, and a quiet token only adds to a count; `conclude`
puts it into the verdicts. A trace or policy that an earlier token still moves is listed until it is
at rest again. numba compiles this module; with `NUMBA_DISABLE_JIT=1` it runs as Python.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from saeguard.guard.aggregates import aggregate
from saeguard.guard.compiled import compiled
from saeguard.guard.step_policy import step_policy
from saeguard.guard.tables import (
    AWAKE,
    ERROR,
    EVALUATED,
    FEATURES,
    POLICIES,
    RESTLESS,
    TOKEN,
    TRACES,
    UNSETTLED,
    Scratch,
    Tables,
)


@compiled
def advance(
    rules: Tables, s: Any, x: Scratch, slot: int, t: int, role: int, fate: int, touched: int,
    everything: bool, hits: np.ndarray, found: int, request: int,
) -> int:  # fmt: skip
    """Advance a request by the token at position `t`.

    Args:
        rules: the compiled policies.
        s: the state.
        x: with the shares of the features that are not at rest.
        slot: of the request.
        t: position, not before the request's next one.
        role: index into `ROLES`.
        fate: EVALUATED, or why the token is skipped.
        touched: length of the list of features that are not at rest.
        everything: evaluate every trace and policy.
        hits: [most, 4] first matches and unread tokens: request, policy, position, error.
        found: number of hits so far.
        request: number that its hits have.

    Returns:
        The number of hits.
    """
    here = s.requests[slot]
    here["next"] = t + 1
    s.counts[slot, role, fate] += 1
    evaluated = fate == EVALUATED
    traces = policies = 0
    if evaluated:
        traces = touch_traces(rules, s, x, slot, t, role, touched, everything)
        policies = touch_policies(rules, s, x, slot, t, role, traces)
    elif fate == ERROR:
        for p in rules.on_error:
            if rules.looks[role, rules.policies[p]["scope"]] and s.policies[slot, p]["sampled"]:
                hits[found, 0], hits[found, 1] = request, p
                hits[found, 2], hits[found, 3] = t, 1
                found += 1
    policies = wake_policies(rules, s, x, slot, t, policies, everything)
    for i in range(policies):
        p = x.lists[POLICIES, i]
        x.marked[POLICIES, p] = False
        looked = evaluated and rules.looks[role, rules.policies[p]["scope"]]
        if step_policy(rules, s, x, slot, p, t, looked and s.policies[slot, p]["sampled"] != 0):
            hits[found, 0], hits[found, 1] = request, p
            hits[found, 2], hits[found, 3] = t, 0
            found += 1
    if evaluated:
        count_looked(rules, s, slot, t, role)
    for i in range(traces):
        trace = x.lists[TRACES, i]
        x.marked[TRACES, trace] = False
        if len(x.compared):
            x.compared[trace] = x.values[trace]
        x.values[trace] = rules.traces[trace]["rest"]
    return found


@compiled
def touch_traces(
    rules: Tables, s: Any, x: Scratch, slot: int, t: int, role: int, touched: int, everything: bool
) -> int:
    """List the traces that are not at rest, with their values; return their number."""
    n = 0
    for i in range(touched):
        feature = rules.features[x.lists[FEATURES, i]]
        for link in range(feature["first"], feature["end"]):
            n = touch_trace(rules, s, x, slot, t, role, rules.links[link], n)
    for trace in rules.restless:
        n = touch_trace(rules, s, x, slot, t, role, trace, n)
    n = touch_restless(rules, s, x, slot, t, role, n)
    if everything:
        for trace in range(len(rules.traces)):
            n = touch_trace(rules, s, x, slot, t, role, trace, n)
    here = s.requests[slot]
    for i in range(n):
        trace = x.lists[TRACES, i]
        if rules.traces[trace]["kind"] != TOKEN:
            state = s.aggregates[slot, rules.traces[trace]["aggregate"]]
            if state["restless"] > t and not state["listed"]:
                state["listed"] = 1
                s.lists[slot, RESTLESS, here["restless"]] = trace
                here["restless"] += 1
    return n


@compiled
def touch_restless(rules: Tables, s: Any, x: Scratch, slot: int, t: int, role: int, n: int) -> int:
    """Add the aggregates that earlier tokens still move to the list of `n`."""
    here, left = s.requests[slot], 0
    for i in range(here["restless"]):
        trace = s.lists[slot, RESTLESS, i]
        state = s.aggregates[slot, rules.traces[trace]["aggregate"]]
        if state["restless"] < t:
            state["listed"] = 0
        else:
            s.lists[slot, RESTLESS, left] = trace
            left += 1
            n = touch_trace(rules, s, x, slot, t, role, trace, n)
    here["restless"] = left
    return n


@compiled
def touch_trace(
    rules: Tables, s: Any, x: Scratch, slot: int, t: int, role: int, trace: int, n: int
) -> int:
    """Add a trace to the list of `n` unless it is there or its scope does not look at the token."""
    rule = rules.traces[trace]
    scope = rule["scope"]
    if x.marked[TRACES, trace] or (scope >= 0 and not rules.looks[role, scope]):
        return n
    x.marked[TRACES, trace] = True
    x.lists[TRACES, n] = trace
    value = x.shares[rule["feature"]]
    x.values[trace] = value if scope < 0 else aggregate(rules, s, slot, trace, t, value)
    return n + 1


@compiled
def touch_policies(
    rules: Tables, s: Any, x: Scratch, slot: int, t: int, role: int, traces: int
) -> int:
    """Update the terms of the listed traces, and list their policies; return their number."""
    n = 0
    for i in range(traces):
        trace = rules.traces[x.lists[TRACES, i]]
        value = x.values[x.lists[TRACES, i]]
        for link in range(trace["first_term"], trace["end_term"]):
            q = rules.links[link]
            if rules.looks[role, rules.terms[q]["scope"]]:
                touch_term(rules, s, slot, q, t, value)
        for link in range(trace["first_policy"], trace["end_policy"]):
            p = rules.links[link]
            if rules.looks[role, rules.policies[p]["scope"]] and not x.marked[POLICIES, p]:
                x.marked[POLICIES, p] = True
                x.lists[POLICIES, n] = p
                n += 1
    for p in rules.awake:
        if rules.looks[role, rules.policies[p]["scope"]] and not x.marked[POLICIES, p]:
            x.marked[POLICIES, p] = True
            x.lists[POLICIES, n] = p
            n += 1
    here, left = s.requests[slot], 0
    for i in range(here["unsettled"]):
        q = s.lists[slot, UNSETTLED, i]
        rule = rules.terms[q]
        if rules.looks[role, rule["scope"]] and not x.marked[TRACES, rule["trace"]]:
            settle(s.terms[slot, q], rules.traces[rule["trace"]]["rest"], t)
        else:
            s.lists[slot, UNSETTLED, left] = q
            left += 1
    here["unsettled"] = left
    return n


@compiled
def touch_term(rules: Tables, s: Any, slot: int, q: int, t: int, value: float) -> None:
    """Count a term that is not at rest, and keep its peak."""
    rule, mine = rules.terms[q], s.terms[slot, q]
    scope = s.scopes[slot, rule["scope"]]
    if mine["touched"] == 0 and scope["looked"] > 0:
        settle(mine, rules.traces[rule["trace"]]["rest"], scope["first"])
    mine["touched"] += 1
    mine["fired"] += value > rule["above"]
    if value > mine["peak"]:
        mine["peak"], mine["peak_at"] = value, t
    if not mine["settled"] and not mine["listed"]:
        here = s.requests[slot]
        mine["listed"] = 1
        s.lists[slot, UNSETTLED, here["unsettled"]] = q
        here["unsettled"] += 1


@compiled
def settle(mine: Any, rest: float, t: int) -> None:
    """Let a term's peak cover the first token at which the term was at rest."""
    mine["settled"] = 1
    if rest > mine["peak"]:
        mine["peak"], mine["peak_at"] = rest, t


@compiled
def wake_policies(
    rules: Tables, s: Any, x: Scratch, slot: int, t: int, n: int, everything: bool
) -> int:
    """Add the policies that earlier tokens still concern to the list of `n`."""
    here, left = s.requests[slot], 0
    for i in range(here["awake"]):
        p = s.lists[slot, AWAKE, i]
        if s.policies[slot, p]["awake"] < t:
            s.policies[slot, p]["listed"] = 0
            continue
        s.lists[slot, AWAKE, left] = p
        left += 1
        if not x.marked[POLICIES, p]:
            x.marked[POLICIES, p] = True
            x.lists[POLICIES, n] = p
            n += 1
    here["awake"] = left
    if everything:
        for p in range(len(rules.policies)):
            if not x.marked[POLICIES, p]:
                x.marked[POLICIES, p] = True
                x.lists[POLICIES, n] = p
                n += 1
    return n


@compiled
def count_looked(rules: Tables, s: Any, slot: int, t: int, role: int) -> None:
    """Count an evaluated token in the scopes that look at its role, after its policies."""
    for scope in range(rules.looks.shape[1]):
        if rules.looks[role, scope]:
            mine, ring = s.scopes[slot, scope], s.looked[slot, scope]
            if mine["looked"] == 0:
                mine["first"] = t
            ring[mine["place"]] = t
            mine["place"] = mine["place"] + 1 if mine["place"] + 1 < len(ring) else 0
            mine["looked"] += 1
            mine["last"] = t
    for i in range(len(rules.windows)):
        window = rules.windows[i]
        if rules.looks[role, window["scope"]]:
            ring, mine = s.looked[slot, window["scope"]], s.scopes[slot, window["scope"]]
            at = mine["place"] - window["k"]
            if at < 0:
                at += len(ring)
            if mine["looked"] >= window["k"] and ring[at] > t - window["n"]:
                s.full[slot, i] = t
