"""TopK and groupmax on a GPU: launch the kernels that decide which watched latents fire.

The decisions are those of `saeguard.sae.topk_watched`, in exact arithmetic. The grids depend on
shapes only, the buffers are allocated once, and each launch reads its work from counters on the
device. So a CUDA graph can hold all launches. If no token passes the screen, every launch but the
first finds no work.

Not run on a GPU so far: the kernels are compiled for three generations of GPUs, and compared with
`saeguard.sae.topk_watched` in Triton's interpreter.
"""

from __future__ import annotations

import torch
import triton

from saeguard.guard.kernels.tap import INNER, WARPS
from saeguard.guard.kernels.topk_kernels import (
    compare_kernel,
    conclude_kernel,
    exact_kernel,
    screen_kernel,
)
from saeguard.guard.topk import Ranked

ROWS = 16
"""Tokens of a tile; `tl.dot` needs 16 at least."""
COMPETITORS = 64
"""Competitors of a tile."""
PROGRAMS = 512
"""Programs that are launched for the close pairs, however many pairs there are."""


def apply_topk(
    ranked: Ranked,
    hidden: torch.Tensor,
    residual: torch.Tensor | None,
    halves: torch.Tensor,
    f: torch.Tensor,
    scale: torch.Tensor | None = None,
) -> None:
    """Set the latents in `f` that do not fire by rank to 0, as `guard.topk.apply_topk` does.

    Args:
        ranked: the block of columns, its competitors and buffers.
        hidden: [rows, d_in], any floating dtype, last axis contiguous.
        residual: the second value of the decoder layer, of the same shape; None without one.
        halves: [] float32, 1 if `residual` is added, else 0.
        f: [rows, watched] float32, `z * (z > theta)` on entry. NaN stays NaN, and latents that
            could not be decided become NaN.
        scale: like `f`, for an SAE that normalises each token.
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
    screen_kernel[tiles](
        hidden,
        second,
        halves,
        mine,
        by,
        ranked.screen,
        ranked.show_all,
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
        # Wider than in `Reach`, since the kernel's own norm of a token is rounded too.
        (d_in + 16) * 2.0**-24,
        **kind,
        TILE=ROWS,
        K=INNER,
    )

    def compare(*, pairs: bool) -> None:
        compare_kernel[(triton.cdiv(len(b), COMPETITORS),)](
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
        conclude_kernel[tiles](
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
    exact_kernel[(PROGRAMS,)](
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
