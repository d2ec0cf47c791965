"""Watch lists without files, and random policies, for tests of the guard's core.

Numbers lie on a grid of eighths, so that float32 arithmetic is exact in whatever order it is
done, and values meet thresholds exactly.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from saeguard.guard.compiled_rules import compile_rules
from saeguard.guard.scopes import ROLES, SCOPES
from saeguard.guard.watchlist import ClampRows, Hook, WatchList
from saeguard.policy.types import (
    Aggregate,
    And,
    Clamp,
    Expr,
    KOf,
    Mode,
    Name,
    Not,
    Or,
    Over,
    Points,
    Policy,
    Scope,
    Selection,
    Window,
)

NAMES = ("a", "b", "c", "d")
FEATURES = 5
BOUND = 10.0
"""Norm above which a token of `random_rows` is an attention sink."""
ABOVE = (0.25, 0.5, 0.6, 1.0)
"""Thresholds; 0.6 is no float32, and `float32(0.6)` exceeds it."""
LOW = np.array([0, 0, 0.25, 0, -0.5], np.float32)
SPAN = np.array([1, 1, 0.5, 2, 1], np.float32)


def make_policy(  # noqa: D103 - a policy with defaults for what a test does not care about
    name: str,
    condition: Expr,
    detect: dict[str, Selection],
    *,
    window: Window = Window(),  # noqa: B008 - frozen
    keep: int = 0,
    scope: Scope = "both",
    mode: Mode = "enforce",
    clamp: Clamp | None = None,
) -> Policy:
    return Policy(
        id=name,
        title="a test policy",
        owner="tests@example.com",
        severity="low",
        mode=mode,
        action="flag" if clamp is None else "clamp",
        on_error="allow",
        scope=scope,
        uncached="count",
        feature_set="tiny",
        rationale="for tests",
        falsepositives=(),
        review_by=None,
        detect=detect,
        condition=condition,
        window=window,
        keep=keep,
        clamp=clamp,
        exceptions=(),
        path=Path(f"{name}.yaml"),
        digest=hashlib.sha256(name.encode()).hexdigest(),
    )


def seeded(seed: int) -> random.Random:
    """Return the randomness of one example."""
    return random.Random(seed)  # noqa: S311 - texts, not secrets


def random_condition(rng: random.Random, depth: int = 2) -> Expr:
    """Return a condition over `NAMES`."""
    kind = rng.choice(["name", "not", "and", "or", "of", "points"]) if depth else "name"
    if kind == "name":
        return Name(rng.choice(NAMES))
    if kind == "not":
        return Not(random_condition(rng, depth - 1))
    terms = tuple(random_condition(rng, depth - 1) for _ in range(rng.randint(2, 3)))
    if kind == "points":
        given = tuple((rng.randint(1, 3), term) for term in terms)
        return Points(rng.randint(1, sum(points for points, _ in given)), given)
    if kind == "of":
        return KOf(rng.randint(1, len(terms)), terms)
    return And(terms) if kind == "and" else Or(terms)


def names_in(expr: Expr) -> set[str]:
    """Return the selections that a condition names."""
    match expr:
        case Name(name):
            return {name}
        case Not(term):
            return names_in(term)
        case And(terms) | Or(terms) | KOf(_, terms):
            return set().union(*map(names_in, terms))
        case Points(_, given):
            return set().union(*(names_in(term) for _, term in given))


def random_over(rng: random.Random, longest: int, *, clamps: bool = False) -> Over:
    """Return what a selection compares, mostly the token's own share."""
    kinds: list[Aggregate] = ["token", "token", "token", "mean", "max", "average", "peak"]
    kind = rng.choice(kinds if clamps else [*kinds, "whole"])
    return Over(kind, 1 if kind in ("token", "peak", "whole") else rng.randint(1, longest))


def random_policy(
    rng: random.Random, name: str, *, longest: int = 9, clamp: Clamp | None = None
) -> Policy:
    """Return a policy over features `f0`, `f1`, ..., its window often longer than a text."""
    condition = random_condition(rng)
    n = rng.choice([1, 1, rng.randint(1, longest)])
    k = rng.randint(1, n)
    window = Window(k, n if rng.random() < 0.85 else None)
    if clamp is None and rng.random() < 0.2:
        window = Window(last=True)
    return make_policy(
        name,
        condition,
        {
            s: Selection(
                f"f{rng.randrange(FEATURES)}",
                rng.choice(ABOVE),
                random_over(rng, longest, clamps=clamp is not None),
            )
            for s in sorted(names_in(condition))
        },
        window=window,
        keep=0 if window.last else rng.choice([0, 0, 1, 3, 20]),
        scope=rng.choice(SCOPES),
        mode=rng.choice(["enforce", "enforce", "shadow"]),
        clamp=clamp,
    )


def random_roles(rng: random.Random, prompt: int) -> list[str]:
    """Return whose turn each token of a prompt is in: short turns, of one token sometimes."""
    roles: list[str] = []
    while len(roles) < prompt:
        role = rng.choice([role for role in ROLES if role != "output"])
        roles += [role] * rng.randint(1, 4)
    return roles[:prompt]


def coded(roles: Sequence[str]) -> np.ndarray:
    """Return roles as the guard has them."""
    return np.array([ROLES.index(role) for role in roles], np.uint8)  # type: ignore[arg-type]


def make_watchlist(
    policies: Sequence[Policy],
    hooks: Sequence[Hook] = (),
    clamps: Sequence[ClampRows] = (),
) -> WatchList:
    """Compile policies over `f0`, `f1`, ...; activation column `j` is what feature `j` is of."""
    features = tuple(f"tiny/f{j}" for j in range(FEATURES))
    return WatchList(
        policies=tuple(policies),
        hooks=tuple(hooks) or (make_hook(),),
        clamps=tuple(clamps),
        features=features,
        mix=((np.arange(FEATURES), np.ones(FEATURES, np.float32)),),
        low=LOW,
        span=SPAN,
        rules=compile_rules(
            policies, {name: j for j, name in enumerate(features)}, rest=-LOW / SPAN
        ),
        exclude_tokens=(1,),
        models=(),
        digest="0" * 64,
    )


def make_hook(layer: int = 0, max_norm: float = math.inf) -> Hook:
    """Return a hook whose latent `j` reads residual entry `j`; every other has a threshold."""
    theta = torch.full((FEATURES,), -torch.inf)
    theta[1::2] = 0.5
    W, b = torch.eye(FEATURES), torch.zeros(FEATURES)
    return Hook(layer, FEATURES, W, b, theta, 0, max_norm=max_norm)


def random_activations(rng: random.Random, tokens: int) -> np.ndarray:
    """Return [tokens, FEATURES] float32 on the grid, with some at thresholds and just beside."""
    out = np.array([[rng.randint(-2, 12) / 8 for _ in range(FEATURES)] for _ in range(tokens)])
    for t in range(tokens):
        if rng.random() < 0.2:
            j = rng.randrange(2)  # features whose share is the activation itself
            nearly = rng.choice([np.float32(0.6), np.nextafter(np.float32(0.5), np.float32(1))])
            out[t, j] = nearly
    return out.reshape(tokens, FEATURES).astype(np.float32)


def random_rows(rng: random.Random, tokens: int) -> np.ndarray:
    """Return [tokens, FEATURES + 1] as a tap does: activations, and a norm that may be massive."""
    norm = np.array([rng.choice([1.0] * 9 + [2 * BOUND]) for _ in range(tokens)], np.float32)
    return np.concatenate([random_activations(rng, tokens), norm[:, None]], axis=1)
