"""The tap on a GPU: residual add, product, norm, threshold and store in one Triton launch.

The grid depends on shapes only, nothing is allocated, and no value travels to the host, so a CUDA
graph can hold the launch. Products and sums are float32 (`ieee`: no tf32), whatever the residual's
dtype. An edit is a second launch, since its rows depend on rules over the other rows of the pass.

Not run on a GPU so far: the kernels are tested in Triton's interpreter against plain torch, and
compiled for three generations of GPUs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

WIDEST = 64
"""Most rows and columns of a tile; `tl.dot` needs 16 at least."""
INNER = 32
WARPS = 8
"""Warps of a program. With 4, float32 products spill (tests/kernels/check_compiles.py)."""


@triton.jit
def load_rows(hidden, residual, halves, row, stride_h, stride_r, k, inside, SECOND: tl.constexpr):
    """Load a tile of the residual stream, [rows, inner] float32; `SECOND` adds `residual`."""
    x = tl.load(hidden + row[:, None] * stride_h + k[None, :], mask=inside, other=0.0)
    x = x.to(tl.float32)
    if SECOND:
        r = tl.load(residual + row[:, None] * stride_r + k[None, :], mask=inside, other=0.0)
        x += r.to(tl.float32) * halves
    return x


# No extra variants for 1 row or a multiple of 16: a request would wait for the compiler.
@triton.jit(do_not_specialize=["rows"])
def _tap_kernel(
    hidden,
    residual,
    halves_at,
    W,
    b,
    theta,
    norm,
    f,
    scale_out,
    rows,
    columns,
    d_in,
    stride_h,
    stride_r,
    stride_w,
    stride_f,
    eps,
    SECOND: tl.constexpr,
    NORMED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    K: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    here, mine = row < rows, column < columns
    at = row.to(tl.int64)
    halves = tl.load(halves_at)
    z = tl.zeros((ROWS, COLUMNS), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    square = tl.zeros((ROWS,), tl.float32)
    for first in range(0, d_in, K):
        k = first + tl.arange(0, K)
        inside = here[:, None] & (k < d_in)[None, :]
        x = load_rows(hidden, residual, halves, at, stride_h, stride_r, k, inside, SECOND)
        w = tl.load(
            W + column.to(tl.int64)[:, None] * stride_w + k[None, :],
            mask=mine[:, None] & (k < d_in)[None, :],
            other=0.0,
        )
        z = tl.dot(x, tl.trans(w), z, input_precision="ieee")
        square += tl.sum(x * x, 1)
        if NORMED:
            total += tl.sum(x, 1)
    if NORMED:
        mean = total / d_in
        spread = tl.zeros((ROWS,), tl.float32)
        for first in range(0, d_in, K):  # a second pass: a difference of squares would lose digits
            k = first + tl.arange(0, K)
            inside = here[:, None] & (k < d_in)[None, :]
            x = load_rows(hidden, residual, halves, at, stride_h, stride_r, k, inside, SECOND)
            away = tl.where(inside, x - mean[:, None], 0.0)
            spread += tl.sum(away * away, 1)
        layer_norm = 1.0 / (tl.sqrt(spread / (d_in - 1)) + eps)
        rescale = tl.sqrt(d_in * 1.0) / tl.sqrt(square)
        # Indices into `saeguard.sae.encoder.NORMS`.
        kind = tl.load(norm + column, mask=mine, other=0)[None, :]
        scale = tl.where(kind == 1, layer_norm[:, None], 1.0)
        scale = tl.where(kind == 2, rescale[:, None], scale)
        z = z * scale
        to = scale_out + at[:, None] * stride_f + column[None, :]
        tl.store(to, scale, mask=here[:, None] & mine[None, :])
    z += tl.load(b + column, mask=mine, other=0.0)[None, :]
    fires = z > tl.load(theta + column, mask=mine, other=0.0)[None, :]
    # A product rather than a choice, so that NaN stays NaN and counts as an error.
    z = z * fires.to(tl.float32)
    to = f + at[:, None] * stride_f + column[None, :]
    tl.store(to, z, mask=here[:, None] & mine[None, :])
    if tl.program_id(1) == 0:
        tl.store(f + at * stride_f + columns, tl.sqrt(square), mask=here)


@triton.jit
def _edit_kernel(
    hidden,
    f,
    scale,
    acted,
    columns,
    owner,
    target,
    W_dec,
    clamped,
    d_in,
    stride_h,
    stride_f,
    stride_a,
    NORMED: tl.constexpr,
    K: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * K + tl.arange(0, K)
    inside = k < d_in
    delta = tl.zeros((K,), tl.float32)
    some = 0
    for j in range(clamped):
        on = tl.load(acted + row * stride_a + tl.load(owner + j)).to(tl.int32)
        if on != 0:
            column = tl.load(columns + j)
            change = tl.load(target + j) - tl.load(f + row * stride_f + column)
            if NORMED:
                change = change / tl.load(scale + row * stride_f + column)
            delta += change * tl.load(W_dec + j * d_in + k, mask=inside, other=0.0)
            some = 1
    if some != 0:
        at = hidden + row * stride_h + k
        h = tl.load(at, mask=inside, other=0.0)
        delta = delta.to(h.dtype).to(tl.float32)  # rounded as in the path without kernels
        tl.store(at, (h.to(tl.float32) + delta).to(h.dtype), mask=inside)


def read(
    hidden: torch.Tensor,
    residual: torch.Tensor | None,
    halves: torch.Tensor,
    W: torch.Tensor,
    b: torch.Tensor,
    theta: torch.Tensor,
    f: torch.Tensor,
    norm: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    eps: float = 1e-5,
) -> None:
    """Launch the kernel that writes watched activations and norms of a forward pass to `f`.

    Args:
        hidden: [rows, d_in], any floating dtype, last axis contiguous.
        residual: the second value of the decoder layer, of the same shape; None without one.
        halves: [] float32, 1 if `residual` is added, else 0.
        W: [watched, d_in] float32, contiguous rows.
        b: [watched] float32.
        theta: [watched] float32.
        f: [rows, watched + 1] float32, written; the last column is the norm of the residual.
        norm: [watched] int64, indices into `NORMS`; None for none.
        scale: like `f`, without the last column; written if there is a norm.
        eps: of layer norm.
    """
    rows, columns = len(f), len(W)
    if not rows or not columns:
        return
    # Few rows take narrow tiles, so that more of the GPU reads weights at once. The self-test at
    # start-up compiles one of the two sizes, and measuring the cost compiles the other.
    height = 16 if rows <= 16 else WIDEST
    width = 16 if rows <= 16 else min(WIDEST, max(16, triton.next_power_of_2(columns)))
    second = hidden if residual is None else residual
    _tap_kernel[(triton.cdiv(rows, height), triton.cdiv(columns, width))](
        hidden,
        second,
        halves,
        W,
        b,
        theta,
        b if norm is None else norm,
        f,
        f if scale is None else scale,
        rows,
        columns,
        hidden.shape[1],
        hidden.stride(0),
        second.stride(0),
        W.stride(0),
        f.stride(0),
        eps,
        SECOND=residual is not None,
        NORMED=norm is not None,
        ROWS=height,
        COLUMNS=width,
        K=INNER,
        num_warps=WARPS,
    )


def edit(
    hidden: torch.Tensor,
    f: torch.Tensor,
    acted: torch.Tensor,
    columns: torch.Tensor,
    owner: torch.Tensor,
    target: torch.Tensor,
    W_dec: torch.Tensor,
    scale: torch.Tensor | None = None,
) -> None:
    """Add `(target - f) / scale @ W_dec` to the rows of `hidden` whose rule acted, in place.

    Args:
        hidden: [rows, d_in], any floating dtype.
        f: [rows, watched + 1] float32.
        acted: [rows, rules] bool.
        columns: [clamped] int64, among the watched.
        owner: [clamped] int64, among the rules.
        target: [clamped] float32.
        W_dec: [clamped, d_in] float32, contiguous.
        scale: like `f`; None for 1.
    """
    rows, d_in = hidden.shape
    if not rows:
        return
    wide = min(1024, triton.next_power_of_2(d_in))
    _edit_kernel[(rows, triton.cdiv(d_in, wide))](
        hidden,
        f,
        f if scale is None else scale,
        acted,
        columns,
        owner,
        target,
        W_dec,
        len(columns),
        d_in,
        hidden.stride(0),
        f.stride(0),
        acted.stride(0),
        NORMED=scale is not None,
        K=wide,
    )
