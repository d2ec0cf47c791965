"""Clamp inside the forward: from the token where a policy matched, set latents to a target.

The whole rule runs on the device, because a match found on the host is a step late, or two
under asynchronous scheduling, and the same text must get the same edit however it was chunked.
State is keyed by request slot and token position, so a position that is computed again (after
preemption, or behind a rejected draft) replaces what was there.

Only the part of the residual along the clamped decoder rows changes, `x + (target - f) @ W_dec`:
the SAE's reconstruction error stays (Templeton et al. 2024, "Scaling Monosemanticity").
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from saeguard.guard.evidence import evidence
from saeguard.guard.rows import Rows
from saeguard.guard.verdict import THRESHOLD
from saeguard.guard.watchlist import ClampRows, Hook, WatchList
from saeguard.policy.types import Expr

NEVER = torch.iinfo(torch.int64).max
MAX_DRAFTS = 64
"""Speculated tokens per step that window state can take back."""


@dataclass(frozen=True, slots=True)
class Rule:
    """One clamp policy's condition, over columns of shares on the device."""

    condition: Expr
    column: Mapping[str, int]
    above: Mapping[str, float]
    k: int
    n: int


@dataclass(frozen=True, slots=True)
class Clamp:
    """One layer's clamp policies: rules, targets and per-request state, all on the device."""

    rules: tuple[Rule, ...]
    policies: tuple[int, ...]
    mix: torch.Tensor
    """[rows, features] float32."""
    low: torch.Tensor
    span: torch.Tensor
    columns: torch.Tensor
    """[clamped] int64: column of each clamped latent among the hook's rows."""
    owner: torch.Tensor
    """[clamped] int64: index of the policy that clamps it, among `rules`."""
    target: torch.Tensor
    W_dec: torch.Tensor
    """[clamped, d_in] float32."""
    enforced: torch.Tensor
    """[slots, rules] bool."""
    scope: torch.Tensor
    """[slots, rules, 2] int64: positions `[from, to)` the rule looks at."""
    first: torch.Tensor
    """[slots, rules] int64: position of the first match, `NEVER` before it."""
    ring: torch.Tensor
    """[slots, ring, rules] float64: evidence by `position % ring`; empty where every n is 1."""
    acted: torch.Tensor
    """[max_tokens, rules] bool: where the last pass clamped."""
    edit: Callable[..., None] | None = None
    """`saeguard.guard.fused.edit`, where the tap runs on a GPU: the edit in one launch."""


def make_clamp(
    watchlist: WatchList,
    rows: ClampRows,
    hook: Hook,
    *,
    slots: int,
    max_tokens: int,
    device: torch.device,
    edit: Callable[..., None] | None = None,
) -> Clamp:
    """Move one layer's clamps to `device`, with state for `slots` requests."""
    policies = [watchlist.policies[i] for i in rows.policies]
    rules = tuple(
        Rule(
            condition=policy.condition,
            column={
                name: int(watchlist.selection_feature[j])
                for name, j in watchlist.policy_selections[i].items()
            },
            above={name: s.above for name, s in policy.detect.items()},
            k=policy.window.k,
            n=policy.window.n,
        )
        for i, policy in zip(rows.policies, policies, strict=True)
    )
    longest = max(rule.n for rule in rules)
    span = hook.first_column, hook.first_column + hook.W.shape[0]

    def on_device(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(device)

    return Clamp(
        rules=rules,
        policies=rows.policies,
        mix=on_device(watchlist.mix[span[0] : span[1]]),
        low=on_device(watchlist.low),
        span=on_device(watchlist.span),
        columns=torch.tensor(rows.columns, device=device),
        owner=torch.tensor(rows.owner, device=device),
        target=rows.target.to(device),
        W_dec=rows.W_dec.to(device),
        enforced=torch.zeros(slots, len(rules), dtype=torch.bool, device=device),
        scope=torch.zeros(slots, len(rules), 2, dtype=torch.int64, device=device),
        first=torch.full((slots, len(rules)), NEVER, dtype=torch.int64, device=device),
        ring=torch.full(
            (slots, 0 if longest == 1 else longest + MAX_DRAFTS, len(rules)),
            -torch.inf,
            dtype=torch.float64,
            device=device,
        ),
        acted=torch.zeros(max_tokens, len(rules), dtype=torch.bool, device=device),
        edit=edit,
    )


def admit(
    clamp: Clamp, slot: int, enforced: Sequence[bool], scope: Sequence[tuple[int, int]]
) -> None:
    """Start a request in `slot`: which rules hold for it, and over which positions."""
    clamp.enforced[slot] = torch.tensor(enforced, device=clamp.enforced.device)
    clamp.scope[slot] = torch.tensor(scope, device=clamp.scope.device)
    clamp.first[slot] = NEVER
    clamp.ring[slot] = -torch.inf


def apply(
    clamp: Clamp,
    hidden: torch.Tensor,
    f: torch.Tensor,
    rows: Rows,
    scale: torch.Tensor | None = None,
) -> None:
    """Add `(target - f) @ W_dec` to the rows at or after their request's first match, in place.

    Args:
        clamp: rules and state; `first`, `ring` and `acted` are updated.
        hidden: [rows, d_in], the half of the residual that takes the edit.
        f: [rows, watched] float32 activations before the edit.
        rows: the layout of this pass.
        scale: [rows, watched] by which an SAE that normalises per token multiplied the residual;
            what its decoder writes is divided by it.
    """
    n = hidden.shape[0]
    slot, position, offset = rows.slot[:n], rows.position[:n], rows.offset[:n]
    start = position - offset
    # What was concluded at or behind a position that is computed anew no longer holds.
    before = clamp.first[slot]
    before = torch.where(before >= start[:, None], NEVER, before)

    # What cannot be read supports nothing, as on the host, and what to subtract is unknown.
    readable = f.isfinite().all(dim=1)
    looked = rows.watched[:n] & readable
    score = _scores(clamp, _evidence(clamp, f, slot, position, looked), slot, position, offset)
    match = (score > THRESHOLD) & clamp.enforced[slot]
    here = torch.where(match, position[:, None], NEVER)
    clamp.first.index_copy_(0, slot, before)
    clamp.first.scatter_reduce_(0, slot[:, None].expand_as(here), here, "amin")
    acted = (position[:, None] >= clamp.first[slot]) & clamp.enforced[slot] & readable[:, None]
    clamp.acted[:n].copy_(acted)

    if clamp.edit is not None:
        clamp.edit(hidden, f, acted, clamp.columns, clamp.owner, clamp.target, clamp.W_dec, scale)
        return
    change = clamp.target - f[:, clamp.columns]
    if scale is not None:
        change = change / scale[:, clamp.columns]
    change = torch.where(acted[:, clamp.owner], change, 0.0)
    hidden.add_((change @ clamp.W_dec).to(hidden.dtype))


def _evidence(
    clamp: Clamp, f: torch.Tensor, slot: torch.Tensor, position: torch.Tensor, looked: torch.Tensor
) -> torch.Tensor:
    """Return [rows, rules] float64, -inf out of scope and where a row is not looked at."""
    shares = ((f @ clamp.mix - clamp.low) / clamp.span).double()
    columns = [
        evidence(
            rule.condition,
            {name: shares[:, j] / rule.above[name] for name, j in rule.column.items()},
            torch,
        )
        for rule in clamp.rules
    ]
    scope = clamp.scope[slot]
    inside = (position[:, None] >= scope[..., 0]) & (position[:, None] < scope[..., 1])
    return torch.where(inside & looked[:, None], torch.stack(columns, 1), -torch.inf)


def _scores(
    clamp: Clamp,
    e: torch.Tensor,
    slot: torch.Tensor,
    position: torch.Tensor,
    offset: torch.Tensor,
) -> torch.Tensor:
    """Return the k-th largest evidence of each rule's last n positions, [rows, rules]."""
    size = clamp.ring.shape[1]
    if size == 0:
        return e
    longest = size - MAX_DRAFTS
    back = torch.arange(longest, device=e.device)
    row = torch.arange(len(e), device=e.device)[:, None] - back
    then = position[:, None] - back
    earlier = clamp.ring[slot[:, None], then % size]
    window = torch.where((back <= offset[:, None])[..., None], e[row.clamp(min=0)], earlier)
    window = torch.where((then >= 0)[..., None], window, -torch.inf)
    scores = [
        window[:, : rule.n, i].topk(rule.k, dim=1).values[:, -1]
        for i, rule in enumerate(clamp.rules)
    ]
    _remember(clamp, e, slot, position, offset)
    return torch.stack(scores, 1)


def _remember(
    clamp: Clamp, e: torch.Tensor, slot: torch.Tensor, position: torch.Tensor, offset: torch.Tensor
) -> None:
    """Write the last rows of each request to its ring; older ones would fall on the same cells."""
    size = clamp.ring.shape[1]
    n = len(e)
    # A row is among the last `size` of its request where the row `size` further on is not its.
    ahead = torch.arange(n, device=e.device) + size
    same = (ahead < n) & (offset[ahead.clamp(max=n - 1)] == offset + size)
    same &= slot[ahead.clamp(max=n - 1)] == slot
    home = torch.where(same, 0, slot)  # slot 0 belongs to nobody
    clamp.ring[home, position % size] = e
