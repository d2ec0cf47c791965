"""The full encode on the device: against float64 and the CPU's decisions, and its times."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache, partial

import torch

from benchmarks.gpu_record import Case, Record
from benchmarks.gpu_timing import captured, ceilings, compared, device, times
from saeguard.sae import EncoderRows, encode_full, encoder_in_memory
from saeguard.sae.checkpoint_info import Norm
from saeguard.sae.encode_triton import encode_into, encode_on_gpu
from saeguard.sae.encoder import token_scale
from tests.kernels.check_rank import rows_with_ties

ACTIVE = 64
"""Latents that fire on a token, about."""
ROOM = 4 * ACTIVE
"""Entries of the buffer, for each token."""
SIZES = (
    (576, 16_384),
    (576, 131_072),
    (2304, 16_384),
    (2304, 65_536),
    (4096, 65_536),
    (4096, 131_072),
)
ROWS = (1, 64, 512, 8192)
PART = 4096
"""Latents of a bare product at once, which divides their numbers: its result stays small."""
ROUNDS = 2


@dataclass(frozen=True)
class Encode:
    """Buffers of one encode; they stay where they are."""

    x: torch.Tensor
    rows: EncoderRows
    token: torch.Tensor
    latent: torch.Tensor
    value: torch.Tensor
    count: torch.Tensor
    scale: torch.Tensor | None = None

    def run(self) -> None:
        """Launch the kernel on an empty buffer."""
        self.count.zero_()
        rows = self.rows
        encode_into(
            self.x, rows.W, rows.b, rows.theta, self.token, self.latent, self.value, self.count,
            self.scale,
        )  # fmt: skip


@cache
def weights(d_in: int, latents: int, dtype: torch.dtype) -> EncoderRows:
    """Return random rows of which about `ACTIVE` fire on a random token."""
    on = device()
    share = torch.tensor(1 - min(ACTIVE, latents / 4) / latents, dtype=torch.float64)
    theta = float(torch.special.ndtri(share))
    W = torch.randn(latents, d_in, device=on, dtype=dtype).mul_(d_in**-0.5)
    b = torch.zeros(latents, device=on)
    return EncoderRows(W, b, torch.full((latents,), theta, device=on))


def make_encode(rows: EncoderRows, tokens: int, *, room: int = ROOM) -> Encode:
    """Allocate the buffers."""
    on, capacity = device(), tokens * min(room, len(rows.b))
    token, latent = (torch.zeros(capacity, dtype=torch.int32, device=on) for _ in range(2))
    x = torch.randn(tokens, rows.W.shape[1], device=on).bfloat16()
    value, count = torch.zeros(capacity, device=on), torch.zeros((), dtype=torch.int32, device=on)
    return Encode(x, rows, token, latent, value, count)


def worst(encode: Encode) -> float:
    """Return the largest error as a share of what rounding may do; infinite where it is wrong."""
    rows, tokens = encode.rows, len(encode.x)
    wide, W = encode.x.double(), rows.W.double()
    z = wide @ W.t()
    bound = wide.norm(dim=1)[:, None] * W.norm(dim=1) * (wide.shape[1] + 16) * 2.0**-24 + 1e-7
    if encode.scale is not None:
        z, bound = (t * encode.scale.double()[:, None] for t in (z, bound))
    z += rows.b.double()
    n = int(encode.count)
    assert n <= len(encode.value), "more fired than there is room for"
    at = encode.token[:n].long(), encode.latent[:n].long()
    shown = torch.zeros(tokens, len(rows.b), dtype=torch.float64, device=z.device)
    times_ = torch.zeros_like(shown, dtype=torch.int32)
    shown[at] = encode.value[:n].double()
    times_.index_put_(at, torch.ones(n, dtype=torch.int32, device=z.device), accumulate=True)
    surely, never = z - bound > rows.theta, z + bound <= rows.theta
    error = (shown - z).abs() / bound
    wrong = (surely & (times_ != 1)) | (never & (times_ != 0)) | (times_ > 1)
    wrong |= (times_ == 1) & ~(error <= 1)
    return float("inf") if wrong.any() else float(error[times_ == 1].max())


def check(tokens: int, d_in: int, latents: int, dtype: torch.dtype, *, scaled: bool) -> Record:
    """Compare eager calls and replays with float64, on inputs that change; then with no room."""
    encode = make_encode(weights(d_in, latents, dtype), tokens)
    if scaled:
        encode = replace(encode, scale=torch.ones(tokens, device=encode.x.device))
    replay, largest = captured(encode.run), 0.0
    for _, call in itertools.product(range(ROUNDS), (encode.run, replay)):
        encode.x.copy_(torch.randn(encode.x.shape, device=encode.x.device))
        if encode.scale is not None:
            scale = token_scale("constant_norm_rescale", encode.x.float())
            assert scale is not None
            encode.scale.copy_(scale[:, 0])
        for buffer in (encode.token, encode.latent):
            buffer.fill_(-1)
        encode.value.fill_(torch.nan)
        call()
        largest = max(largest, worst(encode))
    fired = int(encode.count)
    return {"held": largest <= 1 and overflows(encode), "error": largest, "fired": fired}


def overflows(encode: Encode) -> bool:
    """Return whether a buffer that is too small is filled, not exceeded, and all are counted."""
    fired, small = int(encode.count), 5
    behind = encode.token.new_full((small + 1,), -1)
    latent, value = encode.latent[:small].clone(), encode.value[:small].clone()
    few = replace(encode, token=behind[:small], latent=latent, value=value)
    few.run()
    filled = bool((few.token >= 0).all()) and int(behind[small]) == -1
    return filled and int(few.count) == fired > small


def checks(*, tiny: bool) -> Iterator[Case]:
    """Yield checks of the kernel over sizes, dtypes and scales."""
    every = (
        ((3, 24, 70),)
        if tiny
        else ((1, 576, 4096), (64, 2304, 16_384), (300, 576, 4096), (512, 4096, 131_072))
    )
    for (tokens, d_in, latents), name, scaled in itertools.product(
        every, ("float32", "bfloat16"), (False, True)
    ):
        told = f"{name}, {tokens} rows, width {d_in}, {latents} latents"
        run = partial(check, tokens, d_in, latents, getattr(torch, name), scaled=scaled)
        yield Case(f"{told}{', scaled' if scaled else ''}", run)
        weights.cache_clear()


def check_whole(tokens: int, d_in: int, latents: int, k: int | None, norm: Norm) -> Record:
    """Compare a whole encode, block by block, with the one on a CPU, which decides exactly."""
    rows = rows_with_ties(latents, d_in)
    x = torch.randn(tokens, d_in).bfloat16()
    expected = encode_full(encoder_in_memory(rows, k=k, norm=norm), x)
    ours = encoder_in_memory(rows.to(device()), k=k, norm=norm)
    found = encode_on_gpu(ours, x.to(device()), block=latents // 2 + 1).cpu()
    one, other = (
        torch.zeros(tokens, latents).index_put((s.token, s.latent), s.value)
        for s in (found, expected)
    )
    same = torch.equal(one != 0, other != 0)
    apart = ((one != 0) != (other != 0)) & ((one + other).abs() > 1e-3)
    held = (same or (k is None and not apart.any())) and len(found) == len(set_of(found))
    largest = float((one - other).abs().max())
    return {"held": held and largest < 1e-3 * d_in**0.5, "difference": largest, "fired": len(found)}


def set_of(found: object) -> set[tuple[int, int]]:
    """Return which latents of which tokens fired."""
    return set(zip(found.token.tolist(), found.latent.tolist(), strict=True))  # type: ignore[attr-defined]


def whole_checks(*, tiny: bool) -> Iterator[Case]:
    """Yield checks of whole encodes over norms and numbers of latents that stay."""
    tokens, d_in, latents = (5, 24, 70) if tiny else (64, 576, 4096)
    norms: tuple[Norm, ...] = ("none", "layer_norm", "constant_norm_rescale")
    for norm, k in itertools.product(
        norms[1:] if tiny else norms, (None, 8) if tiny else (None, 1, 64)
    ):
        stay = "all that fire" if k is None else f"the {k} largest"
        name = f"{stay}, {norm}, {tokens} rows, width {d_in}, {latents} latents"
        yield Case(name, partial(check_whole, tokens, d_in, latents, k, norm))


def time_encode(d_in: int, latents: int, tokens: int, dtype: torch.dtype) -> Record:
    """Time the kernel beside a copy of what it reads and a product in float32."""
    encode = make_encode(weights(d_in, latents, dtype), tokens)
    W, x = encode.rows.W.float(), encode.x.float()
    z = torch.empty(tokens, min(PART, latents), device=x.device)

    def bare() -> None:
        for part in W.split(len(z[0])):
            torch.mm(x, part.t(), out=z)

    moved = encode.x.nbytes + encode.rows.W.nbytes
    found = compared(times(encode.run), ceilings(moved, bare))
    return {"rows": tokens, "fired": int(encode.count), **found}


def encode_times(*, tiny: bool) -> Iterator[Case]:
    """Yield times over sizes and rows; the largest with weights in bfloat16, too."""
    sizes = [(d, n, "float32") for d, n in ((24, 70),) if tiny] or [
        *((d, n, "float32") for d, n in SIZES),
        (*SIZES[-1], "bfloat16"),
    ]
    for d_in, latents, name in sizes:
        for tokens in (5,) if tiny else ROWS:
            told = f"{name}, width {d_in}, {latents} latents, {tokens} rows"
            yield Case(told, partial(time_encode, d_in, latents, tokens, getattr(torch, name)))
        weights.cache_clear()
