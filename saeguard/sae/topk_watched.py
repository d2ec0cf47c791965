"""Decide TopK and groupmax for a few watched latents: count larger competitors, do not sort.

A latent of a TopK SAE fires if fewer than `k` of all latents are larger; one of a groupmax SAE, if
no latent of its group is. Only the pairs of token and watched latent that the caller names are
decided. That costs one pass over the competitors, which ends as soon as every pair is decided. The
results equal those of `saeguard.sae.encode_full` bit for bit, since both decide as exact arithmetic
would (`saeguard.sae.topk_all`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from saeguard.sae.checkpoint_info import SaeInfo
from saeguard.sae.encode import FILE_BLOCK, products
from saeguard.sae.encoder import Encoder, encoder_in_memory, open_encoder, product, token_scale
from saeguard.sae.rows import EncoderRows
from saeguard.sae.topk_all import Reach, exactly

COMPARED = 1 << 22
"""Comparisons at once: pairs to decide times competitors of a block."""
FIRST = 512
"""Least number of competitors that every pair is compared with."""


@dataclass(frozen=True, slots=True)
class Competitors:
    """The latents that the watched latents compete with, in memory."""

    encoder: Encoder
    """An encoder of the competitors only."""
    rows: EncoderRows
    """Its encoder rows; `W` is kept in half precision if that loses nothing."""
    start: torch.Tensor
    """[watched] int64: each competes with the competitors `[start, stop)`."""
    stop: torch.Tensor
    own: torch.Tensor
    """[watched] int64: its own index among the competitors."""
    limit: int
    """A latent fires if fewer than this many competitors are larger."""

    def nbytes(self) -> int:
        """Return the bytes that the weights take."""
        return sum(t.numel() * t.element_size() for t in (self.rows.W, self.rows.b))


def read_competitors(
    source: SaeInfo | Encoder, latents: Sequence[int], device: torch.device | None = None
) -> Competitors:
    """Read the latents that `latents` compete with: all for TopK, their groups for groupmax.

    Raises:
        SaeError: the weights are damaged.
    """
    encoder = open_encoder(source)
    assert encoder.k is not None
    limit = 1 if encoder.groups else encoder.k
    groups = sorted({latent // encoder.group for latent in latents})
    spans = [(g * encoder.group, (g + 1) * encoder.group) for g in groups]
    pieces = [
        encoder.block(start, min(start + FILE_BLOCK, stop))
        for begin, stop in spans
        for start in range(begin, stop, FILE_BLOCK)
    ]
    rows = EncoderRows(
        _joined([piece.W for piece in pieces]),
        torch.cat([piece.b for piece in pieces]),
        torch.cat([piece.theta for piece in pieces]),
    ).to(device)
    first = torch.tensor([groups.index(n // encoder.group) * encoder.group for n in latents])
    within = torch.tensor([n % encoder.group for n in latents])
    return Competitors(
        encoder=encoder_in_memory(rows, k=limit, norm=encoder.norm),
        rows=rows,
        start=first.to(device),
        stop=(first + encoder.group).to(device),
        own=(first + within).to(device),
        limit=limit,
    )


def _joined(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Concatenate weights, in the smallest dtype that holds all of them exactly."""
    for dtype in (torch.bfloat16, torch.float16):
        if all(torch.equal(part.to(dtype).float(), part.float()) for part in parts):
            return torch.cat([part.to(dtype) for part in parts])
    return torch.cat([part.float() for part in parts])


@torch.no_grad()
def outranked(
    competitors: Competitors,
    x: torch.Tensor,
    row: torch.Tensor,
    watched: torch.Tensor,
    z: torch.Tensor,
) -> torch.Tensor:
    """Return whether each pair of token and watched latent loses to its competitors, [pairs] bool.

    Args:
        competitors: of the watched latents.
        x: [rows, d_in] float32, the tokens to decide for.
        row: [pairs] int64, the row of `x` of each pair.
        watched: [pairs] int64, the watched latent of each pair.
        z: [pairs] float32, its pre-activation on that token.
    """
    encoder = competitors.encoder
    reach = Reach(encoder, x)
    reach.widen(competitors.rows)
    margin = reach.margin[row]
    low, high = (z - margin)[:, None], (z + margin)[:, None]
    start, stop, own = (
        t[watched][:, None] for t in (competitors.start, competitors.stop, competitors.own)
    )
    above = torch.zeros(len(row), dtype=torch.int64, device=x.device)
    pairs, others = [], []
    for part in products(encoder, x, rows=max(len(x), 1)):
        for begin, end in _spans(part.z.shape[1]):
            open_ = (above < competitors.limit).nonzero()[:, 0]  # most are decided early
            at = torch.arange(begin, end, device=x.device) + part.latent
            for some in torch.split(open_, max(1, COMPARED // (end - begin))):
                values = part.z[row[some], begin:end]
                compete = (at >= start[some]) & (at < stop[some])
                above[some] += (compete & (values > high[some])).sum(1)
                close = compete & (values >= low[some]) & (values <= high[some])
                q, r = (close & (at != own[some])).nonzero(as_tuple=True)
                pairs.append(some[q])
                others.append(at[r])
        if (above >= competitors.limit).all():
            break
    ask, other = torch.cat(pairs), torch.cat(others)
    # Pairs that float32 has decided need no float64.
    open_ = (above[ask] < competitors.limit) & (above + torch.bincount(ask, minlength=len(row)))[
        ask
    ].ge(competitors.limit)
    ask, other = ask[open_], other[open_]
    if len(ask):
        mine = competitors.own[watched[ask]]
        theirs = exactly(encoder, x, row[ask], other)
        ours = exactly(encoder, x, row[ask], mine)
        beats = (theirs > ours) | ((theirs == ours) & (other < mine))
        above.index_add_(0, ask, beats.long())
    return above >= competitors.limit


def _spans(width: int) -> Iterator[tuple[int, int]]:
    """Yield the spans of a block's columns, each twice as long as the one before."""
    begin, size = 0, FIRST
    while begin < width:
        yield begin, min(begin + size, width)
        begin, size = begin + size, 2 * size


def encode_latents(
    source: SaeInfo | Encoder, latents: Sequence[int], x: torch.Tensor
) -> torch.Tensor:
    """Return the activations [tokens, latents] float32 of some latents, TopK applied.

    Raises:
        SaeError: a latent does not exist, or the weights are damaged.
    """
    encoder = open_encoder(source)
    rows, x = encoder.take(latents), x.float()
    z = product(rows, x, token_scale(encoder.norm, x))
    f = z * (z > rows.theta)
    if encoder.k is not None:
        drop(read_competitors(encoder, latents), x, f)
    return f


def drop(competitors: Competitors, x: torch.Tensor, f: torch.Tensor) -> None:
    """Set the activations in `f` [tokens, watched] that do not fire by rank to 0, in place."""
    row, watched = (f != 0).nonzero(as_tuple=True)
    if len(row):
        out = outranked(competitors, x, row, watched, f[row, watched])
        f[row[out], watched[out]] = 0.0
