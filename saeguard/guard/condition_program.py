"""Compile all conditions to one arithmetic program, which gives each policy's evidence per token.

A selection's evidence is `share / above`, so the selection holds if its evidence exceeds 1.
Conditions follow Zadeh's min-max logic (Zadeh 1965, Fuzzy sets): `and` is the minimum, `or` the
maximum, `k of` the k-th largest, `not x` is `2 - x`. `k points of` is the k-th largest of as many
copies of each term as it has points. Every condition holds exactly if its evidence exceeds 1; below
that, the evidence measures the distance, which a ROC curve needs.

`not` is moved down to the selections (De Morgan), which leaves minima, maxima and points of earlier
results. Equal parts of different policies are one node. Nodes of one kind and depth are computed
together, so a thousand policies take a dozen array operations. The arrays are NumPy's for rules on
the host and torch's for clamps inside the forward pass. Evidence is float64, so that `x / a > 1`
agrees with `x > a` for every pair of float32 values.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np

from saeguard.policy.types import And, Expr, KOf, Name, Not, Or, Points

JUST_ABOVE_1 = 1.0 + sys.float_info.epsilon

Op: TypeAlias = Literal["min", "max", "points"]


class Step(NamedTuple):
    """Nodes of one kind that are computed together, from the earlier nodes that `index` lists."""

    op: Op
    index: Any
    """[terms, nodes]; a node with fewer terms than others repeats its first term."""
    points: Any
    """[terms, nodes, 1] of `points`; 0 for a repeated term."""
    k: Any
    """[nodes, 1] points that must be reached."""


class Program(NamedTuple):
    """Conditions compiled to arrays, of NumPy or of torch."""

    plain: Any
    """The selections that are used without `not`."""
    negated: Any
    """The selections that are used with `not`."""
    steps: tuple[Step, ...]
    out: Any
    """[P] index of the node that holds each policy's evidence."""
    size: int
    """Number of nodes."""


def compile_program(conditions: Sequence[tuple[Expr, Mapping[str, int]]]) -> Program:
    """Compile conditions to a program.

    Args:
        conditions: of each policy: the condition, and the index of each selection that it names.
    """
    nodes = _Nodes()
    out = [nodes.add(expr, names, negate=False) for expr, names in conditions]
    leaves = sorted(node for node in nodes.level if nodes.level[node] == 0)
    plain = [node for node in leaves if not node[1]]
    negated = [node for node in leaves if node[1]]
    index_of = {node: i for i, node in enumerate([*plain, *negated])}
    steps = []
    inner = sorted((n for n in nodes.level if nodes.level[n]), key=nodes.order)
    for _, group in groupby(inner, key=lambda node: nodes.order(node)[:3]):
        members = list(group)
        steps.append(_step(members, index_of))
        index_of |= {node: len(index_of) + i for i, node in enumerate(members)}
    return Program(
        plain=np.array([node[0] for node in plain], np.intp),
        negated=np.array([node[0] for node in negated], np.intp),
        steps=tuple(steps),
        out=np.array([index_of[node] for node in out], np.intp),
        size=len(index_of),
    )


def evidence(program: Program, ratio: Any) -> Any:
    """Return evidence [P, N] float64 for `ratio` [selections, N] float64 of share to threshold."""
    xp = np if isinstance(ratio, np.ndarray) else _torch()
    plain, negated = ratio[program.plain], ratio[program.negated]
    nodes = xp.empty((program.size, ratio.shape[1]), dtype=ratio.dtype, **_on(ratio))
    at = len(plain)
    nodes[:at] = plain
    if len(negated):
        # At x == 1 the selection does not hold, so its negation must: never return exactly 1.
        other = 2.0 - negated
        nodes[at : at + len(other)] = xp.where(negated > 1.0, other, other.clip(JUST_ABOVE_1, None))
        at += len(other)
    for step in program.steps:
        end = at + step.index.shape[1]
        if step.op == "points":
            nodes[at:end] = _points(nodes[step.index], step, xp)
        else:
            pick = xp.minimum if step.op == "min" else xp.maximum
            so_far = nodes[step.index[0]]
            for terms in step.index[1:]:  # at most 32
                so_far = pick(so_far, nodes[terms])
            nodes[at:end] = so_far
        at = end
    return nodes[program.out]


def _points(terms: Any, step: Step, xp: Any) -> Any:
    """Return the largest value that terms of at least `k` points in all reach, [nodes, N].

    It tries each term's value: terms are few, and sorting them costs more.
    """
    best = xp.full_like(terms[0], -xp.inf)
    for value in terms:
        reached = (step.points * (terms >= value)).sum(0) >= step.k
        best = xp.maximum(best, xp.where(reached, value, -xp.inf))
    return best


def on_device(program: Program, device: Any) -> Program:
    """Return the program as torch tensors."""
    torch = _torch()

    def move(array: Any) -> Any:
        return torch.from_numpy(np.ascontiguousarray(array)).to(device)

    return Program(
        move(program.plain),
        move(program.negated),
        tuple(Step(s.op, *map(move, s[1:])) for s in program.steps),
        move(program.out),
        program.size,
    )


def _torch() -> Any:
    import torch  # noqa: PLC0415 - policy tests run without torch

    return torch


def _on(array: Any) -> dict[str, Any]:
    return {} if isinstance(array, np.ndarray) else {"device": array.device}


Node: TypeAlias = tuple[Any, ...]
"""(selection, negated), or (op, k, ((points, node), ...))."""


@dataclass(slots=True)
class _Nodes:
    """Collects the distinct nodes of conditions, with the depth of each."""

    level: dict[Node, int] = field(default_factory=dict)
    number: dict[Node, int] = field(default_factory=dict)

    def add(self, expr: Expr, names: Mapping[str, int], *, negate: bool) -> Node:
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

    def order(self, node: Node) -> tuple[int, str, int, int]:
        """Return the sort key: depth, kind, number of terms as a power of two, and number."""
        return (
            self.level[node],
            node[0],
            (len(node[2]) - 1).bit_length(),
            self.number[node],
        )


def _step(members: Sequence[Node], index_of: Mapping[Node, int]) -> Step:
    most = max(len(node[2]) for node in members)
    index = np.zeros((most, len(members)), np.intp)
    points = np.zeros((most, len(members), 1), np.int64)
    for j, (_, _, terms) in enumerate(members):
        index[:, j] = index_of[terms[0][1]]
        for i, (worth, node) in enumerate(terms):
            index[i, j] = index_of[node]
            points[i, j] = worth
    k = np.array([[node[1]] for node in members], np.int64)
    return Step(members[0][0], index, points, k)
