"""TopK and groupmax for a few latents: count the rivals that lie above, instead of sorting all.

A latent of a TopK SAE fires where fewer than `k` of all latents lie above it, one of a groupmax
SAE where none of its group does. Only tokens on which the answer matters are asked about; each
costs one pass over the rivals, which ends early where every question is settled. Decisions are
those of `saeguard.sae.encode_full`, bit for bit: both decide as exact arithmetic does
(`saeguard.sae.topk_all`).
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
"""Comparisons at once: questions times rivals of a block."""
FIRST = 512
"""Rivals that every question meets at least."""


@dataclass(frozen=True, slots=True)
class Competitors:
    """The latents that some watched latents compete with, side by side."""

    encoder: Encoder
    """Over the rivals only, in memory."""
    rows: EncoderRows
    """Its rows; `W` is kept in half precision where that loses nothing."""
    start: torch.Tensor
    """[watched] int64: each competes with the rivals `[start, stop)`."""
    stop: torch.Tensor
    own: torch.Tensor
    """[watched] int64: where it lies itself."""
    limit: int
    """It fires where fewer than this many lie above."""

    def nbytes(self) -> int:
        """Return what it holds in memory."""
        return sum(t.numel() * t.element_size() for t in (self.rows.W, self.rows.b))


def read_competitors(
    source: SaeInfo | Encoder, latents: Sequence[int], device: torch.device | None = None
) -> Competitors:
    """Read what `latents` compete with: the whole SAE for TopK, their groups for groupmax.

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
    """Join weights, in the smallest dtype that holds all of them exactly."""
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
    """Return where a watched latent is not among those that stay, [questions] bool.

    Args:
        competitors: of the watched latents.
        x: [rows, d_in] float32 tokens that are asked about.
        row: [questions] int64, the row each question is about.
        watched: [questions] int64, which watched latent.
        z: [questions] float32, its pre-activation there.
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
    question, rival = [], []
    for part in products(encoder, x, rows=max(len(x), 1)):
        for begin, end in _spans(part.z.shape[1]):
            open_ = (above < competitors.limit).nonzero()[:, 0]  # most have lost after a few rivals
            at = torch.arange(begin, end, device=x.device) + part.latent
            for some in torch.split(open_, max(1, COMPARED // (end - begin))):
                values = part.z[row[some], begin:end]
                rivalry = (at >= start[some]) & (at < stop[some])
                above[some] += (rivalry & (values > high[some])).sum(1)
                close = rivalry & (values >= low[some]) & (values <= high[some])
                q, r = (close & (at != own[some])).nonzero(as_tuple=True)
                question.append(some[q])
                rival.append(at[r])
        if (above >= competitors.limit).all():
            break
    ask, other = torch.cat(question), torch.cat(rival)
    # What is certain already needs no float64.
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
    """Yield parts of a block, each twice as long as the one before."""
    begin, size = 0, FIRST
    while begin < width:
        yield begin, min(begin + size, width)
        begin, size = begin + size, 2 * size


def encode_latents(
    source: SaeInfo | Encoder, latents: Sequence[int], x: torch.Tensor
) -> torch.Tensor:
    """Return the activations [tokens, latents] of some latents, rank and all, in float32.

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
    """Set to 0, in place, what of the activations `f` [tokens, watched] is outranked."""
    row, watched = (f != 0).nonzero(as_tuple=True)
    if len(row):
        out = outranked(competitors, x, row, watched, f[row, watched])
        f[row[out], watched[out]] = 0.0
