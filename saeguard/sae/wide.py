"""All latents on a GPU in one Triton launch: product, threshold and compaction, tile by tile.

A tile's pre-activations never leave the chip; what fires is appended to a buffer of fixed size,
in no order, and all that fired is counted, so that nothing is lost unnoticed. The grid depends on
shapes only and the host is not asked, so a CUDA graph can hold it.

Not run on a GPU so far: the kernel is tested in Triton's interpreter against `encode_full`, and
compiled for three generations of GPUs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

TILE = 64
INNER = 32
WARPS = 8
"""With 4, products in float32 spill registers (tests/kernels/check_compiles.py)."""


@triton.jit
def _encode_kernel(
    x,
    scale,
    W,
    b,
    theta,
    token_out,
    latent_out,
    value_out,
    count,
    tokens,
    latents,
    d_in,
    capacity,
    stride_x,
    stride_w,
    SCALED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    K: tl.constexpr,
):
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    latent = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    here, mine = token < tokens, latent < latents
    z = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(0, d_in, K):
        k = first + tl.arange(0, K)
        some = (k < d_in)[None, :]
        row = tl.load(
            x + token.to(tl.int64)[:, None] * stride_x + k[None, :],
            mask=here[:, None] & some,
            other=0.0,
        )
        w = tl.load(
            W + latent.to(tl.int64)[:, None] * stride_w + k[None, :],
            mask=mine[:, None] & some,
            other=0.0,
        )
        z = tl.dot(row.to(tl.float32), tl.trans(w.to(tl.float32)), z, input_precision="ieee")
    if SCALED:
        z = z * tl.load(scale + token, mask=here, other=0.0)[:, None]
    z += tl.load(b + latent, mask=mine, other=0.0)[None, :]
    # What is not a number counts as firing, so that it is seen.
    quiet = z <= tl.load(theta + latent, mask=mine, other=0.0)[None, :]
    fires = ((quiet == 0) & here[:, None] & mine[None, :]).to(tl.int32)
    by_row = tl.sum(fires, 1)
    total = tl.sum(by_row, 0)
    if total > 0:
        begin = tl.atomic_add(count, total)
        before = tl.cumsum(by_row, 0) - by_row
        at = begin + before[:, None] + tl.cumsum(fires, 1) - fires
        fits = (fires != 0) & (at < capacity)
        shape = tl.zeros((ROWS, COLUMNS), tl.int32)
        tl.store(token_out + at, token[:, None] + shape, mask=fits)
        tl.store(latent_out + at, latent[None, :] + shape, mask=fits)
        tl.store(value_out + at, z, mask=fits)


def encode_into(
    x: torch.Tensor,
    W: torch.Tensor,
    b: torch.Tensor,
    theta: torch.Tensor,
    token: torch.Tensor,
    latent: torch.Tensor,
    value: torch.Tensor,
    count: torch.Tensor,
    scale: torch.Tensor | None = None,
) -> None:
    """Append what fires to a buffer; what does not fit is counted and dropped.

    Args:
        x: [tokens, d_in], any floating dtype.
        W: [latents, d_in], any floating dtype, last axis contiguous.
        b: [latents] float32.
        theta: [latents] float32.
        token: [capacity] int32, written; `latent` alike.
        latent: [capacity] int32.
        value: [capacity] float32, NaN where a pre-activation is not a number.
        count: [] int32, to be 0 before: all that fired, more than `capacity` on overflow.
        scale: [tokens] float32, of an SAE that normalises per token.
    """
    tokens, latents = len(x), len(W)
    if not tokens or not latents:
        return
    _encode_kernel[(triton.cdiv(tokens, TILE), triton.cdiv(latents, TILE))](
        x,
        x if scale is None else scale,
        W,
        b,
        theta,
        token,
        latent,
        value,
        count,
        tokens,
        latents,
        x.shape[1],
        len(value),
        x.stride(0),
        W.stride(0),
        SCALED=scale is not None,
        ROWS=TILE,
        COLUMNS=TILE,
        K=INNER,
        num_warps=WARPS,
    )
