"""Aggregate a feature's shares over several tokens, for selections with `over`."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from saeguard.guard.compiled_rules import Aggregates
from saeguard.guard.state import State


def aggregate(
    over: Aggregates,
    s: State,
    at: np.ndarray,
    position: np.ndarray,
    shares: np.ndarray,
    looked: np.ndarray,
) -> np.ndarray:
    """Return the value of each aggregate at each token, and update the state.

    Args:
        over: the aggregates to compute.
        s: the state; `past`, `level` and `summed` are updated.
        at: [requests] slots.
        position: [requests, tokens], consecutive within each request.
        shares: [requests, tokens, features].
        looked: [requests, tokens, scopes] bool: the token is in the scope and evaluated.

    Returns:
        [requests, tokens, A] float64.
    """
    x = np.where(
        looked[..., over.scope], shares[..., over.feature].astype(np.float64), over.missing
    )
    out = np.empty_like(x)
    windowed = s.past.shape[-1]
    for kind, n, which in over.windows:
        back = (position[:, :1] + np.arange(1 - n, 0)) % over.longest
        line = np.concatenate([s.past[at[:, None], back, which], x[..., which]], axis=1)
        if kind == "mean":
            out[..., which] = of_last(line, n, np.add) / n
        else:
            out[..., which] = of_last(line, n, np.maximum)
    if windowed:
        kept = slice(-over.longest, None)
        s.past[at[:, None], position[:, kept] % over.longest] = x[:, kept, :windowed]
    if x.shape[-1] > windowed:
        level = s.level[at]
        average, peak = over.average, over.peak
        if average.stop:
            mine = slice(average.start - windowed, average.stop - windowed)
            out[..., average] = decayed(x[..., average], over.decay, level[:, mine])
        if peak.stop:
            mine = slice(peak.start - windowed, peak.stop - windowed)
            line = np.concatenate([level[:, None, mine], x[..., peak]], axis=1)
            out[..., peak] = np.maximum.accumulate(line, axis=1)[:, 1:]
        level = out[:, -1, windowed:]
        if over.whole.stop:  # the state keeps sums, the result holds means
            level = level.copy()
            level[:, over.whole.start - windowed :] = _means_so_far(over, s, at, x, looked, out)
        s.level[at] = level
    return out


def _means_so_far(
    over: Aggregates,
    s: State,
    at: np.ndarray,
    x: np.ndarray,
    looked: np.ndarray,
    out: np.ndarray,
) -> np.ndarray:
    """Write the means over the request so far into `out`, and return their sums at the end.

    A running sum adds one token after the other, so it does not depend on how a text is cut.
    """
    which = over.whole
    before = s.level[at][:, None, which.start - s.past.shape[-1] :]
    total = np.cumsum(np.concatenate([before, x[..., which]], axis=1), axis=1)[:, 1:]
    counted = looked[..., over.scope[which]]
    count = s.summed[at][:, None] + counted.cumsum(axis=1)
    out[..., which] = total / np.maximum(count, 1)
    s.summed[at] = count[:, -1]
    last: np.ndarray = total[:, -1]
    return last


def pass_over(over: Aggregates, s: State, slot: int, first: int, end: int) -> None:
    """Advance the aggregates of one slot over the skipped tokens at `first` to `end - 1`."""
    windowed = s.past.shape[-1]
    if windowed:
        missed = np.arange(max(first, end - over.longest), end)
        s.past[slot, missed % over.longest] = over.missing[:windowed]
    if over.average.stop:
        mine = slice(over.average.start - windowed, over.average.stop - windowed)
        s.level[slot, mine] *= over.decay ** (end - first)


def of_last(
    line: np.ndarray, n: int, combine: Callable[[np.ndarray, np.ndarray], np.ndarray]
) -> np.ndarray:
    """Return the combination of each `n` consecutive entries, at the last of them.

    Runs of 1, 2, 4, ... entries are combined from two shorter runs, and `n` entries from the runs
    of its binary digits. A running sum would round differently if a text were chunked differently.

    Args:
        line: [requests, n - 1 + tokens, columns].
        n: number of entries.
        combine: `np.add` or `np.maximum`.

    Returns:
        [requests, tokens, columns].
    """
    tokens = line.shape[1] - n + 1
    out: np.ndarray | None = None
    run, size, done = line, 1, 0
    while done < n:
        if n & size:
            start = n - done - size
            part = run[:, start : start + tokens]
            out = part if out is None else combine(out, part)
            done += size
        if done < n:
            run = combine(run[:, size:], run[:, :-size])
            size *= 2
    assert out is not None
    return out


def decayed(x: np.ndarray, decay: np.ndarray, before: np.ndarray) -> np.ndarray:
    """Return `y[t] = decay * y[t-1] + (1 - decay) * x[t]`, in log2(tokens) array operations.

    Args:
        x: [requests, tokens, columns].
        decay: [columns].
        before: [requests, columns] `y[-1]`.
    """
    y: np.ndarray = (1 - decay) * x
    step = 1
    while step < y.shape[1]:
        y[:, step:] += decay**step * y[:, :-step]
        step *= 2
    power = decay ** np.arange(1, y.shape[1] + 1)[:, None]
    y += power * before[:, None]
    return y
