"""Ranks on a GPU: which watched latents of TopK and groupmax SAEs stay, without asking the host.

The decisions are those of `saeguard.sae.topk_watched`, in exact arithmetic. Grids depend
on shapes only, room is allocated once, and what each launch has to do is read from counters on the
device, so that a CUDA graph can hold all of it; where no token passes the screen, every launch but
the first finds nothing to do.

1. `_screen`: tokens on which a watched latent clears its bar are listed, the others silenced.
2. `_compare`: rivals of the listed tokens, block by block: how many lie surely above each watched
   latent, and how many too close to tell in float32.
3. `_conclude`: silences what has lost, and lists tokens of which something is still open.
4. `_compare` again, of those: lists the close pairs. `_exactly`: compares each in float64.
5. `_conclude` again: silences what has lost. Where pairs did not fit, NaN: it is not known.

Not run on a GPU so far: the kernels are compiled for three generations of them, and held against
`saeguard.sae.topk_watched` in Triton's interpreter.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from saeguard.guard.kernels.tap import INNER, WARPS, load_rows

if TYPE_CHECKING:
    from saeguard.guard.topk import Ranked
    from saeguard.sae.topk_watched import Competitors

ROWS = 16
"""Tokens of a tile; `tl.dot` wants 16 at least."""
COMPETITORS = 64
"""Rivals of a tile."""
PAIRS = 1 << 16
"""Close pairs that there is room for, of one pass."""
PROGRAMS = 512
"""Launched for the close pairs, however many there are."""
LISTED, OPEN, CLOSE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
"""What the three counters count: tokens that passed, those still open, close pairs."""


@dataclass(frozen=True, slots=True)
class TopKBuffers:
    """Where the kernels count."""

    counters: torch.Tensor
    """[3] int32."""
    listed: torch.Tensor
    """[max_tokens] int32: rows of the pass that cleared the screen."""
    open: torch.Tensor
    """[max_tokens] int32: which of the listed are open."""
    margin: torch.Tensor
    """[max_tokens] float32, by place in `listed`: see `saeguard.sae.topk_all.Reach`."""
    above: torch.Tensor
    """[max_tokens, watched] int32, by place in `listed`: rivals above."""
    near: torch.Tensor
    """[max_tokens, watched] int32: rivals too close to tell."""
    pair: torch.Tensor
    """[PAIRS, 2] int32: place in `above`, and the rival."""
    extent: tuple[float, float]
    """The largest norm of a rival's row, and the largest absolute bias."""


def allocate_buffers(
    competitors: Competitors, watched: int, *, max_tokens: int, pairs: int = PAIRS
) -> TopKBuffers:
    """Allocate room for passes of up to `max_tokens` rows."""
    device = competitors.rows.b.device

    def room(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.int32, device=device)

    assert competitors.encoder.longest is not None
    return TopKBuffers(
        counters=room(3),
        listed=room(max_tokens),
        open=room(max_tokens),
        margin=torch.zeros(max_tokens, device=device),
        above=room(max_tokens, watched),
        near=room(max_tokens, watched),
        pair=room(pairs, 2),
        extent=competitors.encoder.longest,
    )


@triton.jit(do_not_specialize=["rows"])
def _screen(
    hidden,
    residual,
    halves_at,
    f,
    scale,
    screen,
    shown,
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
    if tl.load(shown) == 0:
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
            place = tl.atomic_add(counters + LISTED, total) + tl.cumsum(passes, 0) - passes
            tl.store(listed + place, row, mask=passes != 0)
            apart = 2.0 * gamma * (length * longest + highest)
            tl.store(margin + place, apart, mask=passes != 0)
            for first in range(0, watched, K):
                column = first + tl.arange(0, K)
                mine = (passes != 0)[:, None] & (column < watched)[None, :]
                to = place[:, None] * watched + column[None, :]
                tl.store(above + to, tl.zeros((TILE, K), tl.int32), mask=mine)
                tl.store(near + to, tl.zeros((TILE, K), tl.int32), mask=mine)


@triton.jit
def _compare(
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
    begin = tl.program_id(0) * COLUMNS
    rival = begin + tl.arange(0, COLUMNS)
    real = rival < competitors
    halves = tl.load(halves_at)
    tokens = tl.load(counters + (OPEN if PAIR else LISTED))
    for first in range(0, tokens, TILE):
        place = first + tl.arange(0, TILE)
        here = place < tokens
        if PAIR:
            place = tl.load(open_ + place, mask=here, other=0)
        at = tl.load(listed + place, mask=here, other=0).to(tl.int64)
        z = tl.zeros((TILE, COLUMNS), tl.float32)
        for inner in range(0, d_in, K):
            k = inner + tl.arange(0, K)
            inside = here[:, None] & (k < d_in)[None, :]
            x = load_rows(hidden, residual, halves, at, stride_h, stride_r, k, inside, SECOND)
            w = tl.load(
                W + rival.to(tl.int64)[:, None] * stride_w + k[None, :],
                mask=real[:, None] & (k < d_in)[None, :],
                other=0.0,
            )
            z = tl.dot(x, tl.trans(w.to(tl.float32)), z, input_precision="ieee")
        if NORMED:
            z *= tl.load(scale + at * stride_f, mask=here, other=0.0)[:, None]
        z += tl.load(b + rival, mask=real, other=0.0)[None, :]
        apart = tl.load(margin + place, mask=here, other=0.0)
        for j in range(watched):
            low, high = tl.load(start + j), tl.load(stop + j)
            mine = tl.load(f + at * stride_f + j, mask=here, other=0.0)
            to = place * watched + j
            if PAIR:
                sure = tl.load(above + to, mask=here, other=0)
                close = tl.load(near + to, mask=here, other=0)
                asked = here & (mine != 0.0) & (sure < limit) & (sure + close >= limit)
            else:
                asked = here & (mine != 0.0)
            if (low < begin + COLUMNS) & (high > begin) & (tl.max(asked.to(tl.int32), 0) > 0):
                known = (real & (rival >= low) & (rival < high))[None, :] & asked[:, None]
                over = known & (z > (mine + apart)[:, None])
                by = known & (z >= (mine - apart)[:, None]) & (z <= (mine + apart)[:, None])
                by = (by & (rival != tl.load(own + j))[None, :]).to(tl.int32)
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
                        tl.store(pair + 2 * to_pair + 1, rival[None, :] + shape, mask=fits)
                else:
                    won = tl.sum(over.to(tl.int32), 1)
                    tl.atomic_add(above + to, won, mask=won > 0)
                    tl.atomic_add(near + to, in_row, mask=in_row > 0)


@triton.jit
def _conclude(
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
    tokens = tl.load(counters + (OPEN if LAST else LISTED))
    first = tl.program_id(0) * TILE
    if first < tokens:
        place = first + tl.arange(0, TILE)
        here = place < tokens
        if LAST:
            place = tl.load(open_ + place, mask=here, other=0)
        at = tl.load(listed + place, mask=here, other=0).to(tl.int64)
        unsure = tl.zeros((TILE,), tl.int32)
        for begin in range(0, watched, K):
            column = begin + tl.arange(0, K)
            inside = here[:, None] & (column < watched)[None, :]
            to = place[:, None] * watched + column[None, :]
            sure = tl.load(above + to, mask=inside, other=0)
            close = tl.load(near + to, mask=inside, other=0)
            lost = inside & (sure >= limit)
            still = inside & (sure < limit) & (sure + close >= limit)
            mine = f + at[:, None] * stride_f + column[None, :]
            value = tl.load(mine, mask=inside, other=0.0)
            tl.store(mine, value * 0.0, mask=lost)
            if LAST:
                if tl.load(counters + CLOSE) > room:
                    nobody_knows = tl.full((TILE, K), float("nan"), tl.float32)
                    tl.store(mine, nobody_knows, mask=still & (value != 0.0))
            else:
                asked = (still & (value != 0.0)).to(tl.int32)
                unsure = tl.maximum(unsure, tl.max(asked, 1))
        if not LAST:
            total = tl.sum(unsure, 0)
            if total > 0:
                to_open = tl.atomic_add(counters + OPEN, total) + tl.cumsum(unsure, 0) - unsure
                tl.store(open_ + to_open, place, mask=unsure != 0)


@triton.jit
def _exactly(
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
    halves = tl.load(halves_at)
    which = tl.arange(0, 2)
    one = tl.zeros((1,), tl.int64)
    for i in range(tl.program_id(0), tl.minimum(tl.load(counters + CLOSE), room), COUNT):
        to = tl.load(pair + 2 * i)
        rival = tl.load(pair + 2 * i + 1)
        mine = tl.load(own + to % watched).to(tl.int32)
        at = tl.load(listed + to // watched).to(tl.int64)
        # Both in one tensor: equal rows must come out equal, bit for bit.
        latent = tl.where(which == 0, mine, rival).to(tl.int64)
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
        if (theirs > ours) | ((theirs == ours) & (rival < mine)):
            tl.atomic_add(above + to, 1)


def apply_topk(
    ranked: Ranked,
    hidden: torch.Tensor,
    residual: torch.Tensor | None,
    halves: torch.Tensor,
    f: torch.Tensor,
    scale: torch.Tensor | None = None,
) -> None:
    """Leave of `f` what fires, in place, as `saeguard.guard.topk.settle` does.

    Args:
        ranked: which columns, their rivals, and where to count.
        hidden: [rows, d_in], any floating dtype, last axis contiguous.
        residual: the second half, alike; None where a block returns one tensor.
        halves: [] float32, 1 where the second is added.
        f: [rows, watched] float32, `z * (z > theta)` on entry; what is NaN stays so, and what could
            not be told becomes so.
        scale: like `f`, of an SAE that normalises per token.
    """
    competitors, buffers = ranked.competitors, ranked.buffers
    assert buffers is not None
    rows, d_in = hidden.shape
    if not rows:
        return
    mine = f[:, ranked.columns]
    watched = mine.shape[1]
    W, b = competitors.rows.W, competitors.rows.b
    normed = competitors.encoder.norm != "none"
    assert scale is not None or not normed
    by = mine if scale is None else scale[:, ranked.columns]
    second = hidden if residual is None else residual
    strides = hidden.stride(0), second.stride(0)
    kind = {"SECOND": residual is not None, "NORMED": normed}
    buffers.counters.zero_()
    tiles = (triton.cdiv(rows, ROWS),)
    _screen[tiles](
        hidden,
        second,
        halves,
        mine,
        by,
        ranked.screen,
        ranked.shown,
        buffers.counters,
        buffers.listed,
        buffers.margin,
        buffers.above,
        buffers.near,
        rows,
        watched,
        d_in,
        *strides,
        f.stride(0),
        *buffers.extent,
        # Wider than `Reach` by what rounding can do to the length itself.
        (d_in + 16) * 2.0**-24,
        **kind,
        TILE=ROWS,
        K=INNER,
    )

    def compare(*, pairs: bool) -> None:
        _compare[(triton.cdiv(len(b), COMPETITORS),)](
            hidden,
            second,
            halves,
            mine,
            by,
            W,
            b,
            competitors.start,
            competitors.stop,
            competitors.own,
            buffers.counters,
            buffers.listed,
            buffers.open,
            buffers.margin,
            buffers.above,
            buffers.near,
            buffers.pair,
            watched,
            len(b),
            d_in,
            competitors.limit,
            len(buffers.pair),
            *strides,
            W.stride(0),
            f.stride(0),
            **kind,
            PAIR=pairs,
            TILE=ROWS,
            COLUMNS=COMPETITORS,
            K=INNER,
            num_warps=WARPS,
        )

    def conclude(*, last: bool) -> None:
        _conclude[tiles](
            mine,
            buffers.counters,
            buffers.listed,
            buffers.open,
            buffers.above,
            buffers.near,
            watched,
            competitors.limit,
            len(buffers.pair),
            f.stride(0),
            LAST=last,
            TILE=ROWS,
            K=INNER,
        )

    compare(pairs=False)
    conclude(last=False)
    compare(pairs=True)
    _exactly[(PROGRAMS,)](
        hidden,
        second,
        halves,
        by,
        W,
        b,
        competitors.own,
        buffers.counters,
        buffers.listed,
        buffers.above,
        buffers.pair,
        watched,
        d_in,
        len(buffers.pair),
        *strides,
        W.stride(0),
        f.stride(0),
        **kind,
        COUNT=PROGRAMS,
        K=128,
    )
    conclude(last=True)
