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

from saeguard.sae.encoder import Encoder, product, token_scale
from saeguard.sae.rows import EncoderRows
from saeguard.sae.sparse import Sparse, concatenate
from saeguard.sae.topk_all import TopKSearch

TILE = 64
BLOCK = 1 << 16
"""Latents brought to the device at once, where they are not there yet."""
FIRED = 128
"""Entries of a token that a buffer holds at first."""
OPENING = 8192
"""Latents of which the k largest open TopK's screen."""
INNER = 32
WARPS = 8
"""With 4, products in float32 spill registers (tests/kernels/check_compiles.py)."""


@triton.jit(do_not_specialize=["tokens", "latents"])
def _encode_kernel(
    x,
    scale,
    W,
    b,
    theta,
    floor,
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
    stride_k,
    SCALED: tl.constexpr,
    FLOORED: tl.constexpr,
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
            W + latent.to(tl.int64)[:, None] * stride_w + k.to(tl.int64)[None, :] * stride_k,
            mask=mine[:, None] & some,
            other=0.0,
        )
        z = tl.dot(row.to(tl.float32), tl.trans(w.to(tl.float32)), z, input_precision="ieee")
    if SCALED:
        z = z * tl.load(scale + token, mask=here, other=0.0)[:, None]
    z += tl.load(b + latent, mask=mine, other=0.0)[None, :]
    # What is not a number counts as firing, so that it shows in the result.
    quiet = z <= tl.load(theta + latent, mask=mine, other=0.0)[None, :]
    if FLOORED:
        quiet = quiet | (z <= tl.load(floor + token, mask=here, other=0.0)[:, None])
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


def encode_on_gpu(encoder: Encoder, x: torch.Tensor, *, block: int = BLOCK) -> Sparse:
    """Return every active latent of `x` [tokens, d_in], as `encode_full` does, by the kernel.

    For TopK, a floor per token screens the latents, and rises from block to block. Which of the
    remaining latents stay is decided as on a CPU.
    """
    scale = token_scale(encoder.norm, x.float())
    search = None if encoder.k is None else TopKSearch(encoder, x)
    found: list[Sparse] = []
    room = FIRED * len(x)
    for start in range(0, encoder.d_sae, block):
        rows = encoder.block(start, min(start + block, encoder.d_sae)).to(x.device)
        floor = None
        if search is not None:
            if start == 0:
                search.reach.widen(rows)
                first = EncoderRows(*(t[:OPENING] for t in (rows.W, rows.b, rows.theta)))
                for at in range(0, len(x), TILE):
                    part = slice(at, at + TILE)
                    z = product(first, x[part].float(), None if scale is None else scale[part])
                    search.open(at, z)
            floor = search.screen(0, len(x), rows)
        part_, room = _entries(x, rows, scale, floor, room)
        fired = Sparse(part_.token, part_.latent + start, part_.value)
        if search is None:
            found.append(fired)
        else:
            search.add(0, len(x), fired)
    return concatenate(found, x.device) if search is None else search.decide()


def _entries(
    x: torch.Tensor,
    rows: EncoderRows,
    scale: torch.Tensor | None,
    floor: torch.Tensor | None,
    room: int,
) -> tuple[Sparse, int]:
    """Return the active latents and the buffer size used; retry with a larger one if needed."""
    while True:
        token, latent = torch.empty(2, room, dtype=torch.int32, device=x.device)
        value = torch.empty(room, device=x.device)
        count = torch.zeros((), dtype=torch.int32, device=x.device)
        by = None if scale is None else scale[:, 0].contiguous()
        encode_into(x, rows.W, rows.b, rows.theta, token, latent, value, count, by, floor)
        fired = int(count)
        if fired <= room:
            return Sparse(token[:fired].long(), latent[:fired].long(), value[:fired].clone()), room
        room = fired


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
    floor: torch.Tensor | None = None,
) -> None:
    """Append the active latents to a buffer; those that do not fit are counted and dropped.

    Args:
        x: [tokens, d_in], any floating dtype.
        W: [latents, d_in], any floating dtype, in any layout.
        b: [latents] float32.
        theta: [latents] float32.
        token: [capacity] int32, written; so is `latent`.
        latent: [capacity] int32.
        value: [capacity] float32, NaN where a pre-activation is not a number.
        count: [] int32, must be 0 before: number of active latents, above `capacity` on overflow.
        scale: [tokens] float32, of an SAE that normalises per token.
        floor: [tokens] float32: activations of a token must exceed this, too.
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
        theta if floor is None else floor,
        token,
        latent,
        value,
        count,
        tokens,
        latents,
        x.shape[1],
        len(value),
        x.stride(0),
        *W.stride(),
        SCALED=scale is not None,
        FLOORED=floor is not None,
        ROWS=TILE,
        COLUMNS=TILE,
        K=INNER,
        num_warps=WARPS,
    )
