"""Compile the conditions of clamps to one arithmetic program, which runs on the device.

Equal parts of different policies are one node. Nodes of one kind and depth are computed together,
so the program takes a dozen operations, however many clamps there are. They are of torch on a GPU
and of NumPy on a CPU, see `ring`. `saeguard.guard.conditions` says what evidence is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
import torch

from saeguard.guard.clamp import ring
from saeguard.guard.conditions import JUST_ABOVE_1, Node, Nodes, Op
from saeguard.policy.types import Expr


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
    """Conditions compiled to arrays of NumPy; `on_device` moves them to torch."""

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
    nodes = Nodes()
    out = [nodes.add(expr, names) for expr, names in conditions]
    leaves = sorted(node for node in nodes.level if nodes.level[node] == 0)
    plain = [node for node in leaves if not node[1]]
    negated = [node for node in leaves if node[1]]
    index_of = {node: i for i, node in enumerate([*plain, *negated])}
    steps = []
    inner = sorted((n for n in nodes.level if nodes.level[n]), key=partial(_order, nodes))
    for _, group in groupby(inner, key=lambda node: _order(nodes, node)[:3]):
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
    xp, size = ring.module_of(ratio), (program.size, ratio.shape[1])
    plain, negated = ratio[program.plain], ratio[program.negated]
    nodes = xp.empty(size, dtype=ratio.dtype, device=ratio.device)
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


def on_device(program: Program, device: torch.device) -> Program:
    """Return the program as torch tensors."""

    def move(array: Any) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(device)

    return Program(
        move(program.plain),
        move(program.negated),
        tuple(Step(s.op, *map(move, s[1:])) for s in program.steps),
        move(program.out),
        program.size,
    )


def _order(nodes: Nodes, node: Node) -> tuple[int, str, int, int]:
    """Return the sort key: depth, kind, number of terms as a power of two, and number."""
    return nodes.level[node], node[0], (len(node[2]) - 1).bit_length(), nodes.number[node]


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
