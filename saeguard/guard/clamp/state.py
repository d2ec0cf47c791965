"""What the clamps of one layer need on the device: rules, edits, and the state of each request."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch

from saeguard.features.value import Mix
from saeguard.guard.clamp.arrays import ClampArrays, clamp_arrays
from saeguard.guard.clamp.condition_program import Program, on_device
from saeguard.guard.scopes import MEMBERS, SCOPES
from saeguard.guard.watchlist import ClampRows, Hook, WatchList

FOREVER = torch.iinfo(torch.int64).max
MAX_DRAFTS = 64
"""Most speculated tokens per step; the state can go back that many positions."""


@dataclass(frozen=True, slots=True)
class Clamp:
    """One layer's clamp policies: rules, edits and per-request state, all on the device."""

    policies: tuple[int, ...]
    """Indices into the watch list's policies."""
    rules: ClampArrays
    """Compiled from these policies only."""
    program: Program
    mix: Mix
    low: torch.Tensor
    span: torch.Tensor
    trace: torch.Tensor
    above: torch.Tensor
    k: torch.Tensor
    """[rules] number of tokens at which the condition has to hold."""
    keep: torch.Tensor
    """[rules] number of tokens for which a match keeps the clamp on."""
    always: torch.Tensor
    """[rules] bool: the clamp edits without a match."""
    in_request: torch.Tensor
    """[rules] bool: tokens are counted over the whole request."""
    groups: tuple[tuple[int, int, torch.Tensor], ...]
    """(k, n, rules with that window)."""
    feature: torch.Tensor
    """[aggregates] the feature that it aggregates."""
    owned: torch.Tensor
    """[aggregates] the index of a rule that has the aggregate's scope."""
    missing: torch.Tensor
    """[aggregates] the value of a token that is out of scope or not evaluated."""
    decay: torch.Tensor
    columns: torch.Tensor
    """[clamped] int64: column of each clamped latent among the hook's rows."""
    owner: torch.Tensor
    """[clamped] int64: index into `policies` of the policy that clamps it."""
    edits: ClampRows
    enforced: torch.Tensor
    """[slots, rules] bool."""
    looks: torch.Tensor
    """[roles, rules] bool: whether the rule looks at the role."""
    last: torch.Tensor
    """[slots, ring, rules] int64: position of the latest match up to each position, or -1."""
    held: torch.Tensor
    """[slots, ring, rules] int64: tokens up to each position on which the condition holds."""
    ring: torch.Tensor
    """[slots, ring, windowed rules] float64: evidence; empty if every window is one token."""
    past: torch.Tensor
    """[slots, ring, aggregates of a window] float64 shares."""
    level: torch.Tensor
    """[slots, ring, other aggregates] float64 averages and maxima."""
    acted: torch.Tensor
    """[max_tokens, rules] bool: whether the rule edited the row in the last pass."""
    max_norm: float
    """Rows with a larger norm are attention sinks: they give no evidence and are never edited."""
    launch: Callable[..., None] | None = None
    """`saeguard.guard.kernels.tap.edit` on a GPU, for edits that set a value; else None."""
    on_host: Any = None
    """On a CPU, the same clamps with NumPy arrays in place of tensors, which share their memory."""


def make_clamp(
    watchlist: WatchList,
    rows: ClampRows,
    hook: Hook,
    *,
    slots: int,
    max_tokens: int,
    device: torch.device,
    launch: Callable[..., None] | None = None,
) -> Clamp:
    """Return one layer's clamps on `device`, with state for `slots` requests."""
    policies = [watchlist.policies[i] for i in rows.policies]
    clamps = [p.clamp for p in policies if p.clamp is not None]
    wanted = {f"{p.feature_set}/{s.feature}" for p in policies for s in p.detect.values()}
    features = [i for i, name in enumerate(watchlist.features) if name in wanted]
    rules = clamp_arrays(policies, {watchlist.features[i]: j for j, i in enumerate(features)})
    over = rules.aggregates
    windowed = max((which.stop for *_, which in over.windows), default=0)
    count, levels = len(policies), len(over.feature) - windowed
    counts = [p.window.n is None for p in policies]
    scopes = [p.scope for p in policies]

    def move(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(device)

    def full(value: float, size: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.full((slots, size, columns), value, dtype=dtype, device=device)

    double, long = torch.float64, torch.int64
    longest = rules.windowed.longest
    clamp = Clamp(
        policies=rows.policies,
        rules=rules,
        program=on_device(rules.program, device),
        mix=tuple(
            (move(column[kept] - hook.first_column), move(weight[kept]))
            for column, weight in watchlist.mix
            for kept in [[i for i in features if i < len(column)]]
            if kept
        ),
        low=move(watchlist.low[features]),
        span=move(watchlist.span[features]),
        trace=move(rules.trace),
        above=move(rules.above),
        k=torch.tensor([p.window.k for p in policies], device=device),
        keep=torch.tensor(
            [
                p.keep if c.when == "matched" else FOREVER
                for p, c in zip(policies, clamps, strict=True)
            ],
            device=device,
        ),
        always=torch.tensor([c.when == "always" for c in clamps], device=device),
        in_request=torch.tensor(counts, device=device),
        groups=tuple((k, n, move(which)) for k, n, which in rules.windowed.groups),
        feature=move(over.feature),
        owned=torch.tensor(
            [scopes.index(SCOPES[a]) for a in over.scope.tolist()],
            dtype=long,
            device=device,
        ),
        missing=move(over.missing),
        decay=move(over.decay),
        columns=torch.tensor(rows.columns, device=device),
        owner=torch.tensor(rows.owner, device=device),
        edits=rows.to(device),
        enforced=torch.zeros(slots, count, dtype=torch.bool, device=device),
        looks=move(MEMBERS[:, rules.scope]),
        last=full(-1, 1 + MAX_DRAFTS, count, long),
        held=full(0, 1 + MAX_DRAFTS if any(counts) else 0, count, long),
        ring=full(-torch.inf, longest + MAX_DRAFTS if longest > 1 else 0, count, double),
        past=full(0.0, over.longest + MAX_DRAFTS if windowed else 0, windowed, double),
        level=full(0.0, 1 + MAX_DRAFTS if levels else 0, levels, double),
        acted=torch.zeros(max_tokens, count, dtype=torch.bool, device=device),
        max_norm=hook.max_norm,
        launch=launch,
    )
    on_host = device.type == "cpu" and launch is None
    return replace(clamp, on_host=_arrays(clamp)) if on_host else clamp


def _arrays(clamp: Clamp) -> Clamp:
    """Return clamps on a CPU with arrays in place of tensors, in the same memory."""

    def array(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.numpy()
        if isinstance(value, tuple) and not hasattr(value, "_fields"):
            return tuple(map(array, value))
        if isinstance(value, ClampRows):
            return _with_arrays(value)
        return value

    def _with_arrays(held: Any) -> Any:
        return replace(held, **{f.name: array(getattr(held, f.name)) for f in fields(held)})

    arrays: Clamp = replace(_with_arrays(clamp), program=clamp.rules.program)
    return arrays


def admit(clamp: Clamp, slot: int, enforced: Sequence[bool]) -> None:
    """Start a request in a clamp slot; `enforced` holds which rules may edit it."""
    clamp.enforced[slot] = torch.tensor(enforced, device=clamp.enforced.device)
    clamp.last[slot] = -1
    clamp.held[slot] = 0
    clamp.ring[slot] = -torch.inf
    windowed = clamp.past.shape[2]
    clamp.past[slot] = clamp.missing[:windowed]
    clamp.level[slot] = clamp.missing[windowed:]
