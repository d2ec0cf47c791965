"""What `benchmarks/encode.py` times: SAELens, sparsify, saeguard, and the bare matrix product.

All of them encode the same tokens with the same random weights. SAELens keeps `W_enc`
[d_in, d_sae], sparsify its transpose; the floor of each is the product over weights that lie as
they do. Where `[tokens, latents]` would not fit, the libraries and the floor take the tokens in
pieces, one call each.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from saeguard.guard.forward_pass import allocate_rows
from saeguard.guard.install_taps import kernels_for, set_floors
from saeguard.guard.kernels.topk_buffers import allocate_buffers
from saeguard.guard.tap import Tap, read
from saeguard.guard.topk import Ranked
from saeguard.sae import EncoderRows, encode_full, encoder_in_memory
from saeguard.sae.topk_watched import Competitors, read_competitors

WIDTHS = {16_384: 1024, 65_536: 1024, 262_144: 512, 1_048_576: 128}
"""Latents, and the residual's width: the wider SAEs get a narrower one, so that two copies of the
weights and the libraries' own results stay below 6 GiB, and a product of 4,096 tokens below 12 s.
Less of it makes the comparison harder for everything that is not the product."""
TOKENS = (1, 32, 512, 4096)
ACTIVE = 64
"""Latents that fire on a token, about; `k` of TopK."""
LIBRARY_GIB, FLOOR_GIB = 4.0, 0.5
"""What results and temporaries of a library, and the floor's result, may take."""
TEMPORARIES = 4
"""How many [tokens, latents] SAELens holds at its peak (measured)."""
ONE_IN = 1000
"""Of so many tokens one passes the screen."""

Call = Callable[[], Any]


@dataclass(frozen=True, slots=True)
class Weights:
    """One SAE in both layouts."""

    sae: Any
    """SAELens' JumpReLU SAE."""
    coder: Any
    """sparsify's TopK coder."""
    competitors: Competitors
    """Of the watched latents, which are the first."""


@torch.no_grad()
def make_weights(width: int, most_watched: int, device: str) -> Weights:
    """Return random encoders of `width` latents; the first `most_watched` may be watched."""
    from sae_lens import JumpReLUSAE, JumpReLUSAEConfig  # noqa: PLC0415 - seconds
    from sparsify import SparseCoder, SparseCoderConfig  # noqa: PLC0415 - seconds

    d_in = WIDTHS[width]
    config = JumpReLUSAEConfig(d_in=d_in, d_sae=8, apply_b_dec_to_input=False, device=device)
    sae = JumpReLUSAE(config)
    share = torch.tensor(1 - ACTIVE / width, dtype=torch.float64)
    theta = float(torch.special.ndtri(share))  # of N(0, 1), about ACTIVE latents lie above
    sae.W_enc = _fixed(torch.randn(d_in, width, device=device).mul_(d_in**-0.5))
    sae.b_enc = _fixed(torch.zeros(width, device=device))
    sae.threshold = _fixed(torch.full((width,), theta, device=device))
    zero = torch.zeros(width, device=device)
    topk = encoder_in_memory(EncoderRows(sae.W_enc.data.t(), zero, zero), k=ACTIVE)
    competitors = read_competitors(topk, range(most_watched), torch.device(device))
    coder = SparseCoder(
        d_in, SparseCoderConfig(num_latents=8, k=ACTIVE, transcode=True), device=device
    )
    coder.encoder = torch.nn.Linear(1, 1)
    coder.encoder.weight, coder.encoder.bias = _fixed(competitors.rows.W), _fixed(zero)
    return Weights(sae.eval(), coder.eval(), competitors)


def _fixed(values: torch.Tensor) -> torch.nn.Parameter:
    return torch.nn.Parameter(values, requires_grad=False)


def pieces(x: torch.Tensor, width: int, gib: float) -> tuple[torch.Tensor, ...]:
    """Split tokens so that `[tokens, latents]` float32 takes at most so many GiB."""
    return x.split(max(1, int(gib * 2**30 / (4 * width))))


def _each(call: Callable[[torch.Tensor], Any], parts: tuple[torch.Tensor, ...]) -> None:
    for part in parts:
        call(part)


def full_width(weights: Weights, x: torch.Tensor) -> dict[str, Call]:
    """Return what encodes all latents of `x` [tokens, d_in]."""
    sae, rows = weights.sae, weights.competitors.rows
    width = len(rows.b)
    parts = pieces(x, width, FLOOR_GIB)
    z = torch.empty(len(parts[0]), width, device=x.device)

    def floor(W: torch.Tensor) -> None:
        for part in parts:
            torch.mm(part, W, out=z[: len(part)])

    ours = encoder_in_memory(EncoderRows(sae.W_enc.data.t(), sae.b_enc.data, sae.threshold.data))
    library = pieces(x, width, LIBRARY_GIB / TEMPORARIES)
    return {
        "product": partial(floor, sae.W_enc.data),
        "saeguard": partial(encode_full, ours, x),
        "saelens": partial(_each, sae.encode, library),
        "product rows": partial(floor, rows.W.t()),
        "saeguard topk": partial(encode_full, weights.competitors.encoder, x),
        "sparsify topk": partial(_each, weights.coder.encode, library),
    }


def watched_rows(weights: Weights, x: torch.Tensor, watched: int) -> dict[str, Call]:
    """Return the tap's own reading of some latents of `x`.

    `screened` are latents that fire by rank where no token passes the screen, `passed` where one in
    a thousand does, at least one.
    """
    W = weights.competitors.rows.W[:watched]
    W = W * torch.where(W @ x[0] < 0, -1.0, 1.0)[:, None]  # even of one token some fire
    zero = torch.zeros(watched, device=x.device)
    rows = EncoderRows(W, zero, zero)
    peak = torch.cat([(x @ W.t()).amax(1).cpu(), torch.tensor([-1.0])]).sort(descending=True).values
    last = max(1, len(x) // ONE_IN)
    screen_thresholds = {"screened": torch.inf, "passed": float(peak[last - 1 : last + 1].mean())}
    taps = {"watched": make_tap(rows, x)}
    taps |= {
        name: make_tap(rows, x, weights.competitors, screen)
        for name, screen in screen_thresholds.items()
    }
    return {f"{name} {watched}": partial(read, tap, x, None, tap.f) for name, tap in taps.items()}


def make_tap(
    rows: EncoderRows, x: torch.Tensor, competitors: Competitors | None = None, screen: float = 0.0
) -> Tap:
    """Return a tap for passes of `len(x)` tokens, by rank where there are rivals."""
    watched = len(rows.b)
    kernels = kernels_for(x.device)
    ranked: tuple[Ranked, ...] = ()
    if competitors is not None:
        own = {key: getattr(competitors, key)[:watched] for key in ("start", "stop", "own")}
        mine = replace(competitors, **own)
        part = Ranked(
            competitors=mine,
            columns=slice(0, watched),
            rows=rows,
            screen=torch.full((watched,), screen, device=x.device),
            show_all=torch.zeros((), dtype=torch.bool, device=x.device),
            buffers=kernels and allocate_buffers(mine, watched, max_tokens=len(x)),
        )
        ranked = (part,)
    tap = Tap(
        layer=0,
        W=rows.W.t(),
        b=rows.b,
        theta=rows.theta,
        floor=rows.theta.clone(),
        f=torch.empty(len(x), watched + 1, device=x.device),
        halves=torch.ones((), device=x.device),
        ticks=torch.zeros((), dtype=torch.int64, device=x.device),
        rows=allocate_rows(len(x), x.device),
        clamps={},
        kernels=kernels,
        ranked=ranked,
    )
    set_floors(tap)
    return tap
