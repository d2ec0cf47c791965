"""Evaluate clamp policies inside the forward pass, and edit latents in the residual stream.

The whole rule runs on the device: a match found on the host would be one or two steps late, and
the same text must get the same edit however it was chunked. The state is indexed by clamp slot and
position, so a position that is computed again, after a preemption or a rejected draft, overwrites
its state.

The residual becomes `x + (edited - f) @ W_dec`: it changes along the clamped decoder rows only, and
the SAE's reconstruction error stays (Templeton et al. 2024, "Scaling Monosemanticity").
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from saeguard.features.value import Mix, shares_of
from saeguard.guard.clamp import ring
from saeguard.guard.compiled_rules import Rules, compile_rules
from saeguard.guard.condition_program import Program, evidence, on_device
from saeguard.guard.forward_pass import Rows
from saeguard.guard.scopes import MEMBERS, SCOPES
from saeguard.guard.verdict import THRESHOLD
from saeguard.guard.watchlist import ClampRows, Hook, WatchList

FOREVER = torch.iinfo(torch.int64).max
MAX_DRAFTS = 64
"""Most speculated tokens per step; the state can go back that many positions."""


@dataclass(frozen=True, slots=True)
class Clamp:
    """One layer's clamp policies: rules, edits and per-request state, all on the device."""

    policies: tuple[int, ...]
    """Indices into the watch list's policies."""
    rules: Rules
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
    rules = compile_rules(policies, {watchlist.features[i]: j for j, i in enumerate(features)})
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
    return Clamp(
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
        groups=tuple(
            (k, n, move(rules.windowed.policy[which])) for k, n, which in rules.windowed.groups
        ),
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


def admit(clamp: Clamp, slot: int, enforced: Sequence[bool]) -> None:
    """Start a request in a clamp slot; `enforced` holds which rules may edit it."""
    clamp.enforced[slot] = torch.tensor(enforced, device=clamp.enforced.device)
    clamp.last[slot] = -1
    clamp.held[slot] = 0
    clamp.ring[slot] = -torch.inf
    windowed = clamp.past.shape[2]
    clamp.past[slot] = clamp.missing[:windowed]
    clamp.level[slot] = clamp.missing[windowed:]


def apply(
    clamp: Clamp,
    hidden: torch.Tensor,
    f: torch.Tensor,
    rows: Rows,
    scale: torch.Tensor | None = None,
) -> None:
    """Edit the rows on which a clamp is on, in place.

    Args:
        clamp: rules and state; the rings and `acted` are updated.
        hidden: [rows, d_in], the first value of the decoder layer, which takes the edit.
        f: [rows, watched + 1] float32 activations before the edit, and norms.
        rows: the layout of this forward pass.
        scale: [rows, watched] the factor by which an SAE that normalises each token multiplied the
            residual; its decoder's output is divided by it.
    """
    n = hidden.shape[0]
    at = ring.here(rows.clamp_slot[:n], rows.position[:n], rows.offset[:n])
    position = at.position[:, None]
    # A row that is not finite, or massive, gives no evidence, as on the host. The edit of the one
    # would be undefined; the model relies on the other.
    readable = f.isfinite().all(dim=1) & (f[:, -1] <= clamp.max_norm)
    enforced = clamp.enforced[at.slot]
    looked = clamp.looks[rows.role[:n]] & (rows.eligible[:n] & readable)[:, None]

    match = _matches(clamp, _evidence(clamp, f, at, looked), at) & enforced
    last = ring.latest(match, at, ring.before(clamp.last, at, _of(clamp.last, -1)))
    ring.write(clamp.last, last, at)
    on = (last >= 0) & (position - last <= clamp.keep)
    acted = torch.where(clamp.always, looked, on) & enforced & readable[:, None]
    clamp.acted[:n].copy_(acted)

    if clamp.launch is not None and clamp.edits.scale is None and clamp.edits.cap is None:
        edit = clamp.edits
        clamp.launch(hidden, f, acted, clamp.columns, clamp.owner, edit.target, edit.W_dec, scale)
        return
    mine = f[:, clamp.columns]
    change = clamp.edits.edited(mine) - mine
    if scale is not None:
        change = change / scale[:, clamp.columns]
    change = torch.where(acted[:, clamp.owner], change, 0.0)
    hidden.add_((change @ clamp.edits.W_dec).to(hidden.dtype))


def _evidence(clamp: Clamp, f: torch.Tensor, at: ring.Here, looked: torch.Tensor) -> torch.Tensor:
    """Return evidence [rows, rules] float64; -inf if the row is out of the rule's scope."""
    values = shares_of(clamp.mix, clamp.low, clamp.span, f).double()
    if len(clamp.owned):
        values = torch.cat([values, _aggregate(clamp, values, at, looked)], 1)
    e = evidence(clamp.program, values.t()[clamp.trace] / clamp.above).t()
    return torch.where(looked, e, -torch.inf)


def _aggregate(
    clamp: Clamp, shares: torch.Tensor, at: ring.Here, looked: torch.Tensor
) -> torch.Tensor:
    """Return [rows, aggregates] float64; `saeguard.guard.aggregates` does the same on the host."""
    over = clamp.rules.aggregates
    x = torch.where(looked[:, clamp.owned], shares[:, clamp.feature], clamp.missing)
    windowed = clamp.past.shape[2]
    out = torch.empty_like(x)
    if windowed:
        recent = x[:, :windowed]
        line = ring.windows(recent, clamp.past, at, over.longest, clamp.missing[:windowed])
        for kind, n, which in over.windows:
            part = line[:, :n, which]
            out[:, which] = part.sum(1) / n if kind == "mean" else part.amax(1)
        ring.write(clamp.past, recent, at)
    if clamp.level.shape[2]:
        start = ring.before(clamp.level, at, clamp.missing[windowed:])
        average, peak = over.average, over.peak
        if average.stop:
            mine = start[:, average.start - windowed : average.stop - windowed]
            out[:, average] = ring.averaged(x[:, average], at, clamp.decay, mine)
        if peak.stop:
            mine = start[:, peak.start - windowed : peak.stop - windowed]
            out[:, peak] = ring.highest(x[:, peak], at, mine)
        ring.write(clamp.level, out[:, windowed:], at)
    return out


def _matches(clamp: Clamp, e: torch.Tensor, at: ring.Here) -> torch.Tensor:
    """Return [rows, rules] bool: whether the rule's `for` is fulfilled."""
    holds = e > THRESHOLD
    match = holds
    if clamp.ring.shape[1]:
        longest = clamp.rules.windowed.longest
        line = ring.windows(e, clamp.ring, at, longest, _of(clamp.ring, -torch.inf))
        held = (line > THRESHOLD).cumsum(1)
        match = match.clone()
        for k, n, columns in clamp.groups:
            match[:, columns] = held[:, n - 1, columns] >= k
        ring.write(clamp.ring, e, at)
    if clamp.held.shape[1]:
        so_far = ring.counted(holds.long(), at, ring.before(clamp.held, at, _of(clamp.held, 0)))
        ring.write(clamp.held, so_far, at)
        match = torch.where(clamp.in_request, so_far >= clamp.k, match)
    return match


def _of(tensor: torch.Tensor, value: float) -> torch.Tensor:
    return tensor.new_full((), value)
