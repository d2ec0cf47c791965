"""The Triton kernels that decide which watched latents of TopK and groupmax SAEs fire.

`saeguard.guard.kernels.topk` launches them in this order:

1. `screen_kernel` lists the tokens on which a watched latent exceeds its screen threshold, and
   sets the watched latents of every other token to 0.
2. `compare_kernel` counts, for each watched latent of a listed token, the competitors that lie
   surely above it, and those too close to decide in float32.
3. `conclude_kernel` sets latents that do not fire to 0, and lists the tokens with undecided latents
   as open.
4. `compare_kernel` again lists the close pairs of the open tokens, and `exact_kernel` compares each
   pair in float64.
5. `conclude_kernel` again sets latents that do not fire to 0. If the pairs did not fit the buffer,
   it writes NaN for the latents that remain undecided.
"""

from __future__ import annotations

import triton
import triton.language as tl

from saeguard.guard.kernels.tap import load_rows

LISTED, OPEN, CLOSE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
"""The three counters: listed tokens, open tokens, close pairs."""


@triton.jit(do_not_specialize=["rows"])
def screen_kernel(
    hidden,
    residual,
    halves_at,
    f,
    scale,
    screen,
    show_all,
    counters,
    listed,
    margin,
    above,
    near,
    rows,
    watched,
    d_in,
    stride_h,
    stride_r,
    stride_f,
    longest,
    highest,
    gamma,
    SECOND: tl.constexpr,
    NORMED: tl.constexpr,
    TILE: tl.constexpr,
    K: tl.constexpr,
):
    """List the tokens that pass the screen; set the watched latents of the others to 0."""
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)
    here = row < rows
    at = row.to(tl.int64)
    passes = tl.zeros((TILE,), tl.int32)
    for first in range(0, watched, K):
        column = first + tl.arange(0, K)
        inside = here[:, None] & (column < watched)[None, :]
        value = tl.load(f + at[:, None] * stride_f + column[None, :], mask=inside, other=0.0)
        over = value > tl.load(screen + column, mask=column < watched, other=0.0)[None, :]
        passes = tl.maximum(passes, tl.max((over & inside).to(tl.int32), 1))
    if tl.load(show_all) == 0:
        for first in range(0, watched, K):
            column = first + tl.arange(0, K)
            silent = (here & (passes == 0))[:, None] & (column < watched)[None, :]
            to = f + at[:, None] * stride_f + column[None, :]
            # A product, so that NaN stays NaN.
            tl.store(to, tl.load(to, mask=silent, other=0.0) * 0.0, mask=silent)
        total = tl.sum(passes, 0)
        if total > 0:
            halves = tl.load(halves_at)
            square = tl.zeros((TILE,), tl.float32)
            for first in range(0, d_in, K):
                k = first + tl.arange(0, K)
                inside = (passes != 0)[:, None] & (k < d_in)[None, :]
                x = load_rows(hidden, residual, halves, at, stride_h, stride_r, k, inside, SECOND)
                square += tl.sum(x * x, 1)
            length = tl.sqrt(square)
            if NORMED:
                length *= tl.load(scale + at * stride_f, mask=passes != 0, other=0.0)
            entry = tl.atomic_add(counters + LISTED, total) + tl.cumsum(passes, 0) - passes
            tl.store(listed + entry, row, mask=passes != 0)
            apart = 2.0 * gamma * (length * longest + highest)
            tl.store(margin + entry, apart, mask=passes != 0)
            for first in range(0, watched, K):
                column = first + tl.arange(0, K)
                mine = (passes != 0)[:, None] & (column < watched)[None, :]
                to = entry[:, None] * watched + column[None, :]
                tl.store(above + to, tl.zeros((TILE, K), tl.int32), mask=mine)
                tl.store(near + to, tl.zeros((TILE, K), tl.int32), mask=mine)


@triton.jit
def compare_kernel(
    hidden,
    residual,
    halves_at,
    f,
    scale,
    W,
    b,
    start,
    stop,
    own,
    counters,
    listed,
    open_,
    margin,
    above,
    near,
    pair,
    watched,
    competitors,
    d_in,
    limit,
    room,
    stride_h,
    stride_r,
    stride_w,
    stride_f,
    SECOND: tl.constexpr,
    NORMED: tl.constexpr,
    PAIR: tl.constexpr,
    TILE: tl.constexpr,
    COLUMNS: tl.constexpr,
    K: tl.constexpr,
):
    """Count the competitors above each watched latent; with `PAIR`, list the close pairs."""
    begin = tl.program_id(0) * COLUMNS
    competitor = begin + tl.arange(0, COLUMNS)
    real = competitor < competitors
    halves = tl.load(halves_at)
    tokens = tl.load(counters + (OPEN if PAIR else LISTED))
    for first in range(0, tokens, TILE):
        entry = first + tl.arange(0, TILE)
        here = entry < tokens
        if PAIR:
            entry = tl.load(open_ + entry, mask=here, other=0)
        at = tl.load(listed + entry, mask=here, other=0).to(tl.int64)
        z = tl.zeros((TILE, COLUMNS), tl.float32)
        for inner in range(0, d_in, K):
            k = inner + tl.arange(0, K)
            inside = here[:, None] & (k < d_in)[None, :]
            x = load_rows(hidden, residual, halves, at, stride_h, stride_r, k, inside, SECOND)
            w = tl.load(
                W + competitor.to(tl.int64)[:, None] * stride_w + k[None, :],
                mask=real[:, None] & (k < d_in)[None, :],
                other=0.0,
            )
            z = tl.dot(x, tl.trans(w.to(tl.float32)), z, input_precision="ieee")
        if NORMED:
            z *= tl.load(scale + at * stride_f, mask=here, other=0.0)[:, None]
        z += tl.load(b + competitor, mask=real, other=0.0)[None, :]
        apart = tl.load(margin + entry, mask=here, other=0.0)
        for j in range(watched):
            low, high = tl.load(start + j), tl.load(stop + j)
            mine = tl.load(f + at * stride_f + j, mask=here, other=0.0)
            to = entry * watched + j
            if PAIR:
                sure = tl.load(above + to, mask=here, other=0)
                close = tl.load(near + to, mask=here, other=0)
                asked = here & (mine != 0.0) & (sure < limit) & (sure + close >= limit)
            else:
                asked = here & (mine != 0.0)
            if (low < begin + COLUMNS) & (high > begin) & (tl.max(asked.to(tl.int32), 0) > 0):
                known = (real & (competitor >= low) & (competitor < high))[None, :] & asked[:, None]
                over = known & (z > (mine + apart)[:, None])
                by = known & (z >= (mine - apart)[:, None]) & (z <= (mine + apart)[:, None])
                by = (by & (competitor != tl.load(own + j))[None, :]).to(tl.int32)
                in_row = tl.sum(by, 1)
                if PAIR:
                    total = tl.sum(in_row, 0)
                    if total > 0:
                        to_pair = tl.atomic_add(counters + CLOSE, total)
                        to_pair += (tl.cumsum(in_row, 0) - in_row)[:, None]
                        to_pair += tl.cumsum(by, 1) - by
                        fits = (by != 0) & (to_pair < room)
                        shape = tl.zeros((TILE, COLUMNS), tl.int32)
                        tl.store(pair + 2 * to_pair, to[:, None] + shape, mask=fits)
                        tl.store(pair + 2 * to_pair + 1, competitor[None, :] + shape, mask=fits)
                else:
                    won = tl.sum(over.to(tl.int32), 1)
                    tl.atomic_add(above + to, won, mask=won > 0)
                    tl.atomic_add(near + to, in_row, mask=in_row > 0)


@triton.jit
def conclude_kernel(
    f,
    counters,
    listed,
    open_,
    above,
    near,
    watched,
    limit,
    room,
    stride_f,
    LAST: tl.constexpr,
    TILE: tl.constexpr,
    K: tl.constexpr,
):
    """Set latents that do not fire to 0; list open tokens; with `LAST`, NaN for undecided."""
    tokens = tl.load(counters + (OPEN if LAST else LISTED))
    first = tl.program_id(0) * TILE
    if first < tokens:
        entry = first + tl.arange(0, TILE)
        here = entry < tokens
        if LAST:
            entry = tl.load(open_ + entry, mask=here, other=0)
        at = tl.load(listed + entry, mask=here, other=0).to(tl.int64)
        unsure = tl.zeros((TILE,), tl.int32)
        for begin in range(0, watched, K):
            column = begin + tl.arange(0, K)
            inside = here[:, None] & (column < watched)[None, :]
            to = entry[:, None] * watched + column[None, :]
            sure = tl.load(above + to, mask=inside, other=0)
            close = tl.load(near + to, mask=inside, other=0)
            lost = inside & (sure >= limit)
            still = inside & (sure < limit) & (sure + close >= limit)
            mine = f + at[:, None] * stride_f + column[None, :]
            value = tl.load(mine, mask=inside, other=0.0)
            tl.store(mine, value * 0.0, mask=lost)
            if LAST:
                if tl.load(counters + CLOSE) > room:
                    unknown = tl.full((TILE, K), float("nan"), tl.float32)
                    tl.store(mine, unknown, mask=still & (value != 0.0))
            else:
                asked = (still & (value != 0.0)).to(tl.int32)
                unsure = tl.maximum(unsure, tl.max(asked, 1))
        if not LAST:
            total = tl.sum(unsure, 0)
            if total > 0:
                to_open = tl.atomic_add(counters + OPEN, total) + tl.cumsum(unsure, 0) - unsure
                tl.store(open_ + to_open, entry, mask=unsure != 0)


@triton.jit
def exact_kernel(
    hidden,
    residual,
    halves_at,
    scale,
    W,
    b,
    own,
    counters,
    listed,
    above,
    pair,
    watched,
    d_in,
    room,
    stride_h,
    stride_r,
    stride_w,
    stride_f,
    SECOND: tl.constexpr,
    NORMED: tl.constexpr,
    COUNT: tl.constexpr,
    K: tl.constexpr,
):
    """Compare each close pair in float64."""
    halves = tl.load(halves_at)
    which = tl.arange(0, 2)
    one = tl.zeros((1,), tl.int64)
    for i in range(tl.program_id(0), tl.minimum(tl.load(counters + CLOSE), room), COUNT):
        to = tl.load(pair + 2 * i)
        competitor = tl.load(pair + 2 * i + 1)
        mine = tl.load(own + to % watched).to(tl.int32)
        at = tl.load(listed + to // watched).to(tl.int64)
        # Both in one tensor: equal encoder rows must give equal products, bit for bit.
        latent = tl.where(which == 0, mine, competitor).to(tl.int64)
        z = tl.zeros((2,), tl.float64)
        for first in range(0, d_in, K):
            k = first + tl.arange(0, K)
            inside = (k < d_in)[None, :]
            x = load_rows(hidden, residual, halves, at + one, stride_h, stride_r, k, inside, SECOND)
            w = tl.load(W + latent[:, None] * stride_w + k[None, :], mask=inside, other=0.0)
            z += tl.sum(x.to(tl.float64) * w.to(tl.float64), 1)
        if NORMED:
            z *= tl.load(scale + at * stride_f).to(tl.float64)
        z += tl.load(b + latent).to(tl.float64)
        ours = tl.sum(tl.where(which == 0, z, 0.0), 0)
        theirs = tl.sum(tl.where(which == 1, z, 0.0), 0)
        if (theirs > ours) | ((theirs == ours) & (competitor < mine)):
            tl.atomic_add(above + to, 1)
