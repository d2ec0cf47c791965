"""Evaluate clamp policies inside the forward pass, and edit latents in the residual stream.

The whole rule runs on the device: a match found on the host would be one or two steps late, and
the same text must get the same edit however it was chunked. The state is indexed by clamp slot and
position, so a position that is computed again, after a preemption or a rejected draft, overwrites
its state.

The residual becomes `x + (edited - f) @ W_dec`: it changes along the clamped decoder rows only, and
the SAE's reconstruction error stays (Templeton et al. 2024, "Scaling Monosemanticity").

On a CPU the same functions take NumPy arrays, see `ring`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from saeguard.features.value import shares_of
from saeguard.guard.clamp import ring
from saeguard.guard.clamp.condition_program import evidence
from saeguard.guard.clamp.state import Clamp
from saeguard.guard.forward_pass import Rows
from saeguard.guard.host_arrays import array_of
from saeguard.guard.verdict import THRESHOLD


def apply(
    clamp: Clamp,
    hidden: torch.Tensor,
    f: Any,
    rows: Rows,
    scale: torch.Tensor | None = None,
) -> None:
    """Edit the rows on which a clamp is on, in place.

    Args:
        clamp: rules and state; the rings and `acted` are updated.
        hidden: [rows, d_in], the first value of the decoder layer, which takes the edit.
        f: [rows, watched + 1] float32 activations before the edit, and norms; an array on a CPU.
        rows: the layout of this forward pass.
        scale: [rows, watched] the factor by which an SAE that normalises each token multiplied the
            residual; its decoder's output is divided by it.
    """
    n = hidden.shape[0]
    if clamp.on_host is not None:
        _apply_on_host(clamp.on_host, hidden, f, rows, scale)
        return
    at = ring.here(rows.clamp_slot[:n], rows.position[:n], rows.offset[:n])
    acted = _acted(clamp, f, at, rows.role[:n], rows.eligible[:n])
    clamp.acted[:n].copy_(acted)
    if clamp.launch is not None and clamp.edits.scale is None and clamp.edits.cap is None:
        edit = clamp.edits
        clamp.launch(hidden, f, acted, clamp.columns, clamp.owner, edit.target, edit.W_dec, scale)
        return
    hidden.add_(_change(clamp, f, acted, scale).to(hidden.dtype))


def _apply_on_host(
    clamp: Clamp, hidden: torch.Tensor, f: np.ndarray, rows: Rows, scale: torch.Tensor | None
) -> None:
    """Do what `apply` does with the arrays of `Clamp.on_host`, and nothing if nothing may edit.

    What may edit a request is fixed when it is admitted. So requests that no clamp may edit need no
    state.
    """
    n = len(f)
    layout = (rows.clamp_slot, rows.position, rows.offset, rows.role, rows.eligible)
    slot, position, offset, role, eligible = (array_of(part)[:n] for part in layout)
    did: Any = clamp.acted
    if not clamp.enforced[slot].any():
        did[:n] = False
        return
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        did[:n] = acted = _acted(clamp, f, ring.here(slot, position, offset), role, eligible)
        if acted.any():
            change = _change(clamp, f, acted, None if scale is None else scale.numpy())
            if hidden.dtype is torch.float32:
                residual = hidden.numpy()
                residual += change
            else:
                hidden.add_(torch.from_numpy(change).to(hidden.dtype))


def _acted(clamp: Clamp, f: Any, at: ring.Here, role: Any, eligible: Any) -> Any:
    """Return [rows, rules] bool: whether the rule edits the row; update the state."""
    xp = ring.module_of(f)
    # A row that is not finite, or massive, gives no evidence, as on the host. The edit of the one
    # would be undefined; the model relies on the other.
    readable = xp.isfinite(f).all(1) & (f[:, -1] <= clamp.max_norm)
    enforced = clamp.enforced[at.slot]
    looked = clamp.looks[role] & (eligible & readable)[:, None]

    match = _matches(clamp, _evidence(clamp, f, at, looked), at) & enforced
    last = ring.latest(match, at, ring.before(clamp.last, at, -1))
    ring.write(clamp.last, last, at)
    on = (last >= 0) & (at.position[:, None] - last <= clamp.keep)
    return xp.where(clamp.always, looked, on) & enforced & readable[:, None]


def _change(clamp: Clamp, f: Any, acted: Any, scale: Any) -> Any:
    """Return [rows, d_in] float32: the edit of the residual."""
    mine = f[:, clamp.columns]
    change = clamp.edits.edited(mine) - mine
    if scale is not None:
        change = change / scale[:, clamp.columns]
    return ring.module_of(f).where(acted[:, clamp.owner], change, 0.0) @ clamp.edits.W_dec


def _evidence(clamp: Clamp, f: Any, at: ring.Here, looked: Any) -> Any:
    """Return evidence [rows, rules] float64; -inf if the row is out of the rule's scope."""
    xp = ring.module_of(f)
    values = xp.asarray(shares_of(clamp.mix, clamp.low, clamp.span, f), dtype=xp.float64)
    if len(clamp.owned):
        values = xp.concatenate([values, _aggregate(clamp, values, at, looked)], 1)
    e = evidence(clamp.program, values.T[clamp.trace] / clamp.above).T
    return xp.where(looked, e, -xp.inf)


def _aggregate(clamp: Clamp, shares: Any, at: ring.Here, looked: Any) -> Any:
    """Return [rows, aggregates] float64; `saeguard.guard.aggregates` does it token by token."""
    xp, over = ring.module_of(shares), clamp.rules.aggregates
    x = xp.where(looked[:, clamp.owned], shares[:, clamp.feature], clamp.missing)
    windowed = clamp.past.shape[2]
    out = xp.empty_like(x)
    if windowed:
        recent = x[:, :windowed]
        line = ring.windows(recent, clamp.past, at, over.longest, clamp.missing[:windowed])
        for kind, n, which in over.windows:
            part = line[:, :n, which]
            out[:, which] = part.sum(1) / n if kind == "mean" else xp.amax(part, 1)
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


def _matches(clamp: Clamp, e: Any, at: ring.Here) -> Any:
    """Return [rows, rules] bool: whether the rule's `for` is fulfilled."""
    xp = ring.module_of(e)
    holds = e > THRESHOLD
    match = holds
    if clamp.ring.shape[1]:
        line = ring.windows(e, clamp.ring, at, clamp.rules.windowed.longest, -xp.inf)
        held = (line > THRESHOLD).cumsum(1)
        match = xp.asarray(holds, copy=True)
        for k, n, columns in clamp.groups:
            match[:, columns] = held[:, n - 1, columns] >= k
        ring.write(clamp.ring, e, at)
    if clamp.held.shape[1]:
        counts = xp.asarray(holds, dtype=xp.int64)
        so_far = ring.counted(counts, at, ring.before(clamp.held, at, 0))
        ring.write(clamp.held, so_far, at)
        match = xp.where(clamp.in_request, so_far >= clamp.k, match)
    return match
