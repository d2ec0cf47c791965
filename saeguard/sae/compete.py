"""TopK and groupmax: which latents stay, decided as exact arithmetic would, block by block.

A latent stays where fewer than `k` others lie above it. Two float32 products of the same numbers
differ in their last bits with the shape of the matrices, so "above" is only taken from float32
where the gap exceeds what rounding can do; what lies closer is computed again in float64. Equal
latents: the lower index stays. So the decision does not depend on the block size, on how many
tokens are encoded together, or on whether all latents are wanted or one.
"""

from __future__ import annotations

import numpy as np
import torch

from saeguard.sae.encoder import Encoder, row_norm, token_scale
from saeguard.sae.rows import EncoderRows
from saeguard.sae.sparse import Sparse, concatenate, nonzero

SEED = 4096
"""Latents whose k-th largest opens the screen."""
EXACT_ENTRIES = 4096
"""Pre-activations computed in float64 at once."""


class Contest:
    """TopK over all latents: a running k-th largest per token screens block after block."""

    def __init__(self, encoder: Encoder, x: torch.Tensor) -> None:
        """Begin for the tokens `x` [tokens, d_in]."""
        assert encoder.k is not None
        self.encoder, self.x = encoder, x
        self.reach = Reach(encoder, x)
        self.found: list[Sparse] = []
        self.best = torch.full((len(x), encoder.k), -torch.inf, device=x.device)
        """[tokens, k] the largest so far, in order."""

    def enter(self, token: int, latent: int, z: torch.Tensor, rows: EncoderRows) -> None:
        """Take in the pre-activations `z` of the tokens and latents that begin here."""
        at = slice(token, token + len(z))
        if token == 0:
            self.reach.widen(rows)
        margin = self.reach.margin[at]
        best = self.best[at]
        floor = best[:, -1]
        k = best.shape[1]
        if latent == 0 and z.shape[1] >= k:
            floor = z[:, : max(k, SEED)].topk(k, dim=1).values[:, -1]
        # TopK has one threshold for all latents: 0, or none where it keeps what is below.
        floor = torch.maximum(floor - margin, rows.theta[0])
        part = nonzero(z > floor[:, None], z, 0, latent)
        if len(part):
            self.best[at] = torch.cat([best, _padded(part, len(z))], 1).topk(k, dim=1).values
            keep = part.value > rows.theta[part.latent - latent]
            self.found.append(Sparse(part.token[keep] + token, part.latent[keep], part.value[keep]))
        if sum(map(len, self.found)) > 2 * self.best.numel() + (1 << 20):
            self._prune()

    def _prune(self) -> None:
        entries = concatenate(self.found, self.x.device)
        floor = self.best[:, -1] - self.reach.margin
        self.found = [entries.pick(entries.value >= floor[entries.token])]

    def decide(self) -> Sparse:
        """Return what stays."""
        self._prune()
        (entries,) = self.found
        assert self.encoder.k is not None
        last = self.best[:, -1]
        return choose(
            self.encoder, self.x, entries, entries.token, last, self.encoder.k, self.reach
        )


class GroupContest:
    """Groupmax: the largest of each group of neighbours, whole groups at a time."""

    def __init__(self, encoder: Encoder, x: torch.Tensor) -> None:
        """Begin for the tokens `x` [tokens, d_in]."""
        self.encoder, self.x = encoder, x
        self.reach = Reach(encoder, x)
        self.found: list[Sparse] = []
        assert encoder.k is not None
        self.best = torch.full((len(x), encoder.k), -torch.inf, device=x.device)
        """[tokens, groups] the largest of each group."""

    def enter(self, token: int, latent: int, z: torch.Tensor, rows: EncoderRows) -> None:
        """Take in the pre-activations `z` of the tokens and whole groups that begin here."""
        if token == 0:
            self.reach.widen(rows)
        grouped = z.view(len(z), -1, self.encoder.group)
        margin = self.reach.margin[token : token + len(z), None]
        best, group = grouped.amax(2), latent // self.encoder.group
        self.best[token : token + len(z), group : group + best.shape[1]] = best
        floor = torch.maximum(best - margin, rows.theta[0])
        part = nonzero((grouped >= floor[..., None]).view(z.shape), z, token, latent)
        self.found.append(part.pick(part.value > rows.theta[0]))

    def decide(self) -> Sparse:
        """Return what stays."""
        entries = concatenate(self.found, self.x.device)
        groups = self.encoder.d_sae // self.encoder.group
        owner = entries.token * groups + entries.latent // self.encoder.group
        return choose(self.encoder, self.x, entries, owner, self.best.reshape(-1), 1, self.reach)


class Reach:
    """How far apart two float32 pre-activations of a token must lie for their order to be sure.

    `|fl(z) - z| <= gamma * (scale * |x| * |w| + |b|)` for each of the two.
    """

    def __init__(self, encoder: Encoder, x: torch.Tensor) -> None:
        """Know the tokens; `widen` tells of the latents."""
        wide = x.float()
        length = torch.linalg.vector_norm(wide, dim=1)
        scale = token_scale(encoder.norm, wide)
        self._length = length if scale is None else length * scale[:, 0]
        self._gamma = (encoder.d_in + 4) * 2.0**-24
        self._longest = encoder.longest
        self._w, self._b = encoder.longest or 0.0, 0.0
        self.margin = torch.zeros_like(length)
        """[tokens] float32."""

    def widen(self, rows: EncoderRows) -> None:
        """Take the latents `rows` in."""
        if self._longest is None:
            self._w = max(self._w, row_norm(rows.W))
        self._b = max(self._b, float(rows.b.abs().max()))
        self.margin = 2.0 * self._gamma * (self._length * self._w + self._b)


def exactly(encoder: Encoder, x: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
    """Return the pre-activations of `latents` [entries] at `x` [entries, d_in], in float64."""
    out = torch.empty(len(latents), dtype=torch.float64, device=x.device)
    for first in range(0, len(latents), EXACT_ENTRIES):
        at = slice(first, first + EXACT_ENTRIES)
        wanted, which = torch.unique(latents[at], return_inverse=True)
        rows = encoder.take(wanted.tolist())
        wide = x[at].float()
        z = (wide.double() * rows.W.double()[which]).sum(1)
        scale = token_scale(encoder.norm, wide)
        if scale is not None:
            z *= scale[:, 0].double()
        out[at] = z + rows.b.double()[which]
    return out


def choose(
    encoder: Encoder,
    x: torch.Tensor,
    entries: Sparse,
    owner: torch.Tensor,
    last: torch.Tensor,
    limit: int,
    reach: Reach,
) -> Sparse:
    """Return the `limit` largest entries of each owner.

    Args:
        encoder: to compute again what is too close.
        x: [tokens, d_in].
        entries: float32 pre-activations that may be among the largest.
        owner: [entries] int64, among which entries each competes.
        last: [owners] the `limit`-th largest of each; -inf where there are fewer.
        limit: how many stay.
        reach: what counts as close.
    """
    gap = entries.value - last[owner]
    margin = reach.margin[entries.token]
    sure, near = gap > margin, gap.abs() <= margin
    left = limit - torch.bincount(owner[sure], minlength=len(last))
    close = torch.bincount(owner[near], minlength=len(last))
    keep = sure | (near & (close <= left)[owner])
    open_ = (near & (close > left)[owner]).nonzero()[:, 0]
    if len(open_):
        some = entries.pick(open_)
        exact = exactly(encoder, x[some.token], some.latent).cpu().numpy()
        who = owner[open_].cpu().numpy()
        order = np.lexsort((some.latent.cpu().numpy(), -exact, who))
        stays = _place(who[order]) < left.cpu().numpy()[who[order]]
        keep[open_[torch.from_numpy(order[stays]).to(x.device)]] = True
    return entries.pick(keep)


def _place(who: np.ndarray) -> np.ndarray:
    """Return each entry's place among its owner's, for owners in order."""
    begins = np.flatnonzero(np.diff(who, prepend=-1))
    sizes = np.diff(begins, append=len(who))
    place: np.ndarray = np.arange(len(who)) - np.repeat(begins, sizes)
    return place


def _padded(part: Sparse, tokens: int) -> torch.Tensor:
    """Return the values side by side, [tokens, most of one token], filled up with -inf.

    On the host, and in NumPy: these are too few for several threads to be worth their start.
    """
    token = part.token.cpu().numpy()  # in order
    sizes = np.bincount(token, minlength=tokens)
    out = np.full((tokens, sizes.max()), -np.inf, np.float32)
    out[token, _place(token)] = part.value.cpu().numpy()
    return torch.from_numpy(out).to(part.value.device)
