"""The policies' rules as tables, which lead from a feature that fires to the policies it concerns.

feature -> traces (its own share, and aggregates of it) -> terms and policies that compare them.

Everything has a value at rest: a trace while its feature stays quiet, a policy while all its traces
do. `saeguard.guard.evaluate` evaluates what a token moves away from rest, and nothing else.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from saeguard.errors import InputError
from saeguard.guard.conditions import Nodes, Op
from saeguard.guard.evidence import rest_evidence
from saeguard.guard.scopes import BY_ROLE, MEMBERS, OF_OUTPUT, SCOPES
from saeguard.guard.tables import (
    AVERAGE,
    COUNT,
    FEATURE,
    LAST,
    LEAF,
    LEAST,
    MAX,
    MEAN,
    MOST,
    NEGATED,
    NODE,
    PEAK,
    POINTS,
    POLICY,
    TERM,
    THRESHOLD,
    TOKEN,
    TRACE,
    WHOLE,
    WINDOW,
    WINDOW_OF,
    Scratch,
    Tables,
)
from saeguard.policy.types import Aggregate, Expr, Over, Policy

MAX_NODES = 1_000_000
"""Selections and parts of conditions over all policies."""

KINDS: Mapping[Aggregate, int] = {
    "token": TOKEN,
    "mean": MEAN,
    "max": MAX,
    "average": AVERAGE,
    "peak": PEAK,
    "whole": WHOLE,
}
OPS: Mapping[Op, int] = {"min": LEAST, "max": MOST, "points": POINTS}


class RulesError(InputError):
    """The policies' conditions have too many parts."""


class Rules(NamedTuple):
    """The compiled policies, in the watch list's order."""

    policies: tuple[Policy, ...]
    tables: Tables
    scope: np.ndarray
    """[P] index into `SCOPES`."""
    aggregates: int
    """Number of distinct aggregates."""
    kept: int
    """Tokens that are kept of each request: all windows, one after the other."""
    longest: int
    """Tokens of the longest window."""
    terms: tuple[tuple[int, ...], ...]
    """[P] term of each selection, in `detect` order."""
    sampled: tuple[int, ...]
    """The policies that look at a sample of the requests only."""
    clamps: np.ndarray
    """[P] bool: the policy's action is a clamp, which the device carries out."""
    approximate: tuple[bool, ...]
    """[P] whether the policy reads a latent by a fixed threshold that replaces its rank."""
    by_role: bool
    """Whether some policy needs the role of each prompt token."""
    of_output: bool
    """Whether some policy looks at the output, and so at the part of it that a prompt holds."""


def compile_rules(
    policies: Sequence[Policy],
    column: Mapping[str, int],
    approximate: Collection[str] = (),
    rest: np.ndarray | None = None,
) -> Rules:
    """Compile policies to tables.

    Args:
        policies: in the watch list's order.
        column: `feature_set/feature` -> its column among the shares.
        approximate: the features whose latents fire by fixed thresholds in place of ranks.
        rest: [features] share of each feature while none of its latents fires; None for 0. It
            decides what is evaluated, and changes no verdict.

    Raises:
        RulesError: the conditions have too many parts.
    """
    traces, terms, windows = _Keys(), _Keys(), _Keys()
    conditions = _Conditions()
    of_policies, of_terms, reads, kept = [], [], [], 0
    for policy in policies:
        names, mine = {}, []
        scope = SCOPES.index(policy.scope)
        for name, selection in policy.detect.items():
            over, feature = selection.over, column[f"{policy.feature_set}/{selection.feature}"]
            trace = traces[over, feature, -1 if over.kind == "token" else scope]
            names[name] = trace, selection.above
            mine.append(terms[trace, selection.above, scope])
        of_terms.append(tuple(mine))
        reads.append([trace for trace, _ in names.values()])
        nodes = conditions.add(policy.condition, names)
        k, n = policy.window.k, policy.window.n or 1
        kind = LAST if policy.window.last else COUNT if policy.window.n is None else WINDOW
        window = windows[scope, k, n] if kind == WINDOW else -1
        of_policies.append((0.0, scope, kind, k, n, policy.keep, window, kept, *nodes))
        kept += k if kind == COUNT else n if n > 1 else 0
    if len(conditions.nodes) > MAX_NODES:
        raise RulesError(
            f"the policies' conditions have {len(conditions.nodes):,} parts in all, at most "
            f"{MAX_NODES:,} are allowed; load fewer policies, or split them over several servers"
        )
    at_rest = np.zeros(len(column)) if rest is None else rest.astype(np.float64)
    table = _trace_table(list(traces), at_rest)
    held = np.where(np.isin(table["kind"], (MEAN, MAX)), table["n"], 0)
    table["first_kept"] = kept + np.cumsum(held) - held
    features = np.zeros(len(column), FEATURE)
    features["rest"] = at_rest
    links = conditions.links
    _link(features, "first", "end", [[feature] for feature in table["feature"].tolist()], links)
    _link(table, "first_term", "end_term", [[trace] for trace, _, _ in terms], links)
    _link(table, "first_policy", "end_policy", reads, links)
    moving = np.isin(table["kind"], (MEAN, AVERAGE, WHOLE)) & (at_rest[table["feature"]] != 0)
    tables = Tables(
        looks=MEMBERS,
        features=features,
        traces=table,
        policies=np.array(of_policies, POLICY),
        nodes=np.array(conditions.nodes, NODE),
        links=np.array(links, np.int32),
        terms=np.array([(above, trace, scope) for trace, above, scope in terms], TERM),
        windows=np.array(list(windows), WINDOW_OF),
        restless=np.flatnonzero(moving).astype(np.int32),
        awake=np.empty(0, np.int32),
        on_error=np.array([i for i, p in enumerate(policies) if p.on_error == "stop"], np.int32),
    )
    longest = max(int(table["n"].max(initial=1)), int(tables.policies["n"].max(initial=1)))
    evidence = np.zeros(len(policies))
    rest_evidence(tables, make_scratch(tables, longest), evidence)
    tables.policies["rest"] = evidence
    awake = np.flatnonzero(~(evidence <= THRESHOLD))
    return Rules(
        policies=tuple(policies),
        tables=tables._replace(awake=awake.astype(np.int32)),
        scope=tables.policies["scope"].copy(),
        aggregates=int((table["kind"] != TOKEN).sum()),
        kept=kept + int(held.sum()),
        longest=longest,
        terms=tuple(of_terms),
        sampled=tuple(i for i, p in enumerate(policies) if p.sample < 1),
        clamps=np.array([p.action == "clamp" for p in policies], bool),
        approximate=tuple(
            any(f"{p.feature_set}/{name}" in approximate for name in _read_by(p)) for p in policies
        ),
        by_role=any(p.scope in BY_ROLE for p in policies),
        of_output=any(p.scope in OF_OUTPUT for p in policies),
    )


class _Keys(dict[Any, int]):
    """Numbers keys in the order in which they are first looked up."""

    def __missing__(self, key: Any) -> int:
        self[key] = number = len(self)
        return number


@dataclass(slots=True)
class _Conditions:
    """Collects the nodes of conditions, policy by policy, a node's terms before the node."""

    nodes: list[tuple[Any, ...]] = field(default_factory=list)
    links: list[int] = field(default_factory=list)

    def add(self, condition: Expr, names: Mapping[str, tuple[int, float]]) -> tuple[int, int]:
        """Add a condition; return the first of its nodes, and the node after the last."""
        first, found = len(self.nodes), Nodes()
        selections = list(names.values())
        found.add(condition, {name: i for i, name in enumerate(names)})
        for node in sorted(found.number, key=found.number.__getitem__):
            if found.level[node] == 0:
                trace, above = selections[node[0]]
                self.nodes.append((above, NEGATED if node[1] else LEAF, trace, 0, 0, 0))
                continue
            op, k, terms = node
            start = len(self.links)
            for points, term in terms:
                self.links += [found.number[term], points]
            self.nodes.append((0.0, OPS[op], 0, k, start, len(self.links)))
        return first, len(self.nodes)


def _trace_table(keys: Sequence[tuple[Over, int, int]], at_rest: np.ndarray) -> np.ndarray:
    table = np.zeros(len(keys), TRACE)
    for i, (over, feature, scope) in enumerate(keys):
        here = table[i]
        here["kind"], here["feature"], here["scope"], here["n"] = (
            KINDS[over.kind], feature, scope, over.n
        )  # fmt: skip
        here["rest"] = at_rest[feature]
        here["decay"] = 0.5 ** (1 / over.n)
    table["aggregate"] = np.cumsum(table["kind"] != TOKEN) - 1
    return table


def _link(
    table: np.ndarray, first: str, end: str, items: Sequence[Iterable[int]], links: list[int]
) -> None:
    """Append to `links`, for each record of the table, which items name it; note where they lie."""
    named: dict[int, list[int]] = {}
    for i, item in enumerate(items):
        for at in dict.fromkeys(item):
            named.setdefault(at, []).append(i)
    for at, found in named.items():
        table[first][at] = len(links)
        links += found
        table[end][at] = len(links)


def make_scratch(rules: Tables, longest: int, *, record: bool = False) -> Scratch:
    """Return scratch memory for `advance`, with everything at rest.

    Args:
        rules: the compiled policies.
        longest: tokens of the longest window.
        record: whether evidence, scores and compared values of each token are asked for.
    """
    policies = len(rules.policies)
    most = max(len(rules.features), len(rules.traces), policies, 1)
    nodes = rules.policies["end_node"] - rules.policies["first_node"]
    return Scratch(
        shares=rules.features["rest"].copy(),
        values=rules.traces["rest"].copy(),
        nodes=np.zeros(int(nodes.max(initial=1))),
        window=np.zeros(longest),
        lists=np.zeros((3, most), np.int64),
        marked=np.zeros((3, most), bool),
        evidence=np.zeros(policies if record else 0),
        scores=np.zeros(policies if record else 0),
        compared=np.zeros(len(rules.traces) if record else 0),
    )


def make_hits(rules: Tables) -> np.ndarray:
    """Return memory for the hits of some tokens, [hits, 4] int64; see `evaluate.advance`."""
    return np.empty((2 * (len(rules.policies) + len(rules.on_error)) + 64, 4), np.int64)


def _read_by(policy: Policy) -> list[str]:
    clamped = policy.clamp.features if policy.clamp else ()
    return [*(s.feature for s in policy.detect.values()), *clamped]


def is_sampled(policy: Policy, request_id: str) -> bool:
    """Return whether the policy looks at a request; every process returns the same answer.

    A hash of the policy's id and the request's decides. So a policy's shadow and enforced variants
    look at the same requests, and other policies at other requests.
    """
    if policy.sample >= 1:
        return True
    found = hashlib.sha256(f"{policy.id}\n{request_id}".encode()).digest()
    return int.from_bytes(found[:8]) < policy.sample * 2**64
