"""Decide TopK and groupmax over all latents, block by block, as exact arithmetic would.

A latent is kept if fewer than `k` others are larger. Two float32 products of the same numbers
differ in their last bits with the shape of the matrices. So float32 decides only if the gap exceeds
the rounding error; closer latents are computed again in float64. Of equal latents the lower index
is kept. So the result does not depend on the block size, on the number of tokens that are encoded
together, or on whether one latent is wanted or all.
"""

from __future__ import annotations

import numpy as np
import torch

from saeguard.sae.encoder import Encoder, extent, token_scale
from saeguard.sae.rows import EncoderRows
from saeguard.sae.sparse import Sparse, above, concatenate

EXACT_ENTRIES = 2048
"""Pre-activations whose weights are gathered at once for float64."""
EXACT_AT_ONCE = 256
"""Pre-activations computed in float64 at once, so that their numbers stay in the CPU's cache."""

CLOSE = 32
"""Number of latents beyond the k largest that are examined, since they may be as large."""


class TopKSearch:
    """Find the k largest latents of each token, with a lower bound that screens each block."""

    def __init__(self, encoder: Encoder, x: torch.Tensor) -> None:
        """Start the search for the tokens `x` [tokens, d_in]."""
        assert encoder.k is not None
        self.encoder, self.x, self.k = encoder, x, encoder.k
        self.reach = Reach(encoder, x)
        self.floor = np.full(len(x), -np.inf, np.float32)
        """[tokens] a lower bound of the k-th largest."""
        self.found: dict[int, list[Sparse]] = {}
        """Entries that may be kept, by the index of their block's first token."""

    def enter(self, token: int, latent: int, z: torch.Tensor, rows: EncoderRows) -> None:
        """Add a block of pre-activations `z`, whose first token and first latent are given."""
        if token == 0:
            self.reach.widen(rows)
        if latent == 0:
            self.open(token, z)
        floor = self.screen(token, len(z), rows)
        self.add(token, len(z), above(z, floor[:, None], token, latent))

    def open(self, token: int, z: torch.Tensor) -> None:
        """Set a first lower bound from the first latents of a block of tokens."""
        self.floor[token : token + len(z)] = _opening(z, self.k)

    def screen(self, token: int, tokens: int, rows: EncoderRows) -> torch.Tensor:
        """Return the value above which an entry of each token may be kept, [tokens] float32."""
        at = slice(token, token + tokens)
        margin = self.reach.margin[at].cpu().numpy()
        # TopK has one threshold for all latents: 0, or -inf if it keeps negative latents.
        floor = np.maximum(self.floor[at] - margin, float(rows.theta[0]))
        return torch.from_numpy(floor).to(self.x.device)

    def add(self, token: int, tokens: int, part: Sparse) -> None:
        """Add the entries of a block of tokens that passed the screen."""
        parts = self.found.setdefault(token, [])
        parts.append(part)
        if sum(map(len, parts)) > 4 * self.k * tokens:
            at = slice(token, token + tokens)
            margin = self.reach.margin[at].cpu().numpy()
            found = concatenate(parts, self.x.device)
            host = found.cpu()
            row, value = host.token.numpy() - token, host.value.numpy()
            self.floor[at] = _last(row, value, self.k, tokens)
            parts[:] = [found.pick(np.flatnonzero(value >= (self.floor[at] - margin)[row]))]

    def decide(self) -> Sparse:
        """Return the entries that are kept."""
        entries = concatenate(
            [part for parts in self.found.values() for part in parts], self.x.device
        )
        return choose(self.encoder, self.x, entries, entries.token, len(self.x), self.k, self.reach)


def largest(encoder: Encoder, x: torch.Tensor, z: torch.Tensor, rows: EncoderRows) -> Sparse | None:
    """Return the entries that TopK keeps, by sorting; None if too many are close to the k-th.

    For a few tokens this takes fewer steps than `TopKSearch`, and a step costs more than its work.

    Args:
        encoder: of a TopK SAE.
        x: [tokens, d_in].
        z: [tokens, d_sae] pre-activations.
        rows: all encoder rows.
    """
    assert encoder.k is not None
    k, reach = encoder.k, Reach(encoder, x)
    reach.widen(rows)
    top = z.topk(min(k + CLOSE, z.shape[1]), dim=1)
    low = top.values[:, k - 1 : k] - reach.margin[:, None]
    near = top.values >= low
    if near.shape[1] < z.shape[1] and near[:, -1].any():
        return None
    token, place = (near & (top.values > rows.theta[0])).nonzero(as_tuple=True)
    entries = Sparse(token, top.indices[token, place], top.values[token, place])
    if near.shape[1] > k and not near[:, k].any():  # the next is clearly smaller than the k-th
        return entries
    return choose(encoder, x, entries, token, len(x), k, reach)


class GroupMaxSearch:
    """Find the largest latent of each group of neighbours; a block holds whole groups."""

    def __init__(self, encoder: Encoder, x: torch.Tensor) -> None:
        """Begin for the tokens `x` [tokens, d_in]."""
        self.encoder, self.x = encoder, x
        self.reach = Reach(encoder, x)
        self.found: list[Sparse] = []

    def enter(self, token: int, latent: int, z: torch.Tensor, rows: EncoderRows) -> None:
        """Add a block of pre-activations `z`, whose first token and first latent are given."""
        if token == 0:
            self.reach.widen(rows)
        grouped = z.view(len(z), -1, self.encoder.group)
        margin = self.reach.margin[token : token + len(z), None, None]
        floor = torch.maximum(grouped.amax(2, keepdim=True) - margin, rows.theta[0])
        self.found.append(above(grouped, floor, token, latent))

    def decide(self) -> Sparse:
        """Return the entries that are kept."""
        entries = concatenate(self.found, self.x.device)
        groups = self.encoder.d_sae // self.encoder.group
        owner = entries.token * groups + entries.latent // self.encoder.group
        return choose(self.encoder, self.x, entries, owner, len(self.x) * groups, 1, self.reach)


def _opening(z: torch.Tensor, k: int) -> np.ndarray | float:
    """Return a lower bound of the k-th largest of each token in `z`, [tokens].

    The bound is the k-th largest of the maxima of 4 k groups, which is close and quick to find.
    """
    groups = min(4 * k, z.shape[1])
    if groups < k:
        return -np.inf
    spans = z.shape[1] // groups
    grouped = z[:, : spans * groups].view(len(z), spans, groups)
    peak: np.ndarray = grouped.amax(1).cpu().numpy()
    peak.partition(groups - k, axis=1)
    return peak[:, groups - k]


def _last(owner: np.ndarray, value: np.ndarray, k: int, owners: int) -> np.ndarray:
    """Return the k-th largest value of each owner, [owners]; -inf for owners with fewer values."""
    # An integer that falls as the float rises, below its owner: one sort of integers, which is
    # several times faster than one by two keys.
    bits = value.view(np.int32)
    key = (owner << 32) - (bits ^ ((bits >> 31) & 0x7FFFFFFF))
    key.sort()
    sizes = np.bincount(owner, minlength=owners)
    enough = np.flatnonzero(sizes >= k)
    at = (np.cumsum(sizes) - sizes)[enough] + k - 1
    rising = ((enough << 32) - key[at]).astype(np.int32)
    last = np.full(owners, -np.inf, np.float32)
    last[enough] = (rising ^ ((rising >> 31) & 0x7FFFFFFF)).view(np.float32)
    return last


class Reach:
    """The gap above which the order of two float32 pre-activations of a token is certain.

    `|fl(z) - z| <= gamma * (scale * |x| * |w| + |b|)` for each of the two.
    """

    def __init__(self, encoder: Encoder, x: torch.Tensor) -> None:
        """Take the tokens; `widen` adds the latents if the encoder has no bound on their norms."""
        wide = x.float()
        length = torch.linalg.vector_norm(wide, dim=1)
        scale = token_scale(encoder.norm, wide)
        self._length = length if scale is None else length * scale[:, 0]
        self._gamma = (encoder.d_in + 4) * 2.0**-24
        self._known = encoder.longest is not None
        self._take(encoder.longest or (0.0, 0.0))

    def widen(self, rows: EncoderRows) -> None:
        """Widen the gap for the encoder rows of further latents."""
        if not self._known:
            w, b = extent(rows)
            self._take((max(self._w, w), max(self._b, b)))

    def _take(self, longest: tuple[float, float]) -> None:
        self._w, self._b = longest
        twice = 2.0 * self._gamma
        self.margin = self._length * (twice * self._w) + twice * self._b
        """[tokens] float32."""


def exactly(
    encoder: Encoder, x: torch.Tensor, token: torch.Tensor, latent: torch.Tensor
) -> torch.Tensor:
    """Return the pre-activations [entries] of `latent` at the rows `token` of `x`, in float64."""
    out = torch.empty(len(latent), dtype=torch.float64, device=x.device)
    for first in range(0, len(latent), EXACT_ENTRIES):
        last = min(first + EXACT_ENTRIES, len(latent))
        wanted, which = torch.unique(latent[first:last], return_inverse=True)
        rows = encoder.take(wanted.tolist()).to(x.device)
        for start in range(first, last, EXACT_AT_ONCE):
            at = slice(start, min(start + EXACT_AT_ONCE, last))
            row = which[at.start - first : at.stop - first]
            wide = x[token[at]].float()
            z = wide.double().mul_(rows.W[row].double()).sum(1)
            scale = token_scale(encoder.norm, wide)
            if scale is not None:
                z *= scale[:, 0].double()
            out[at] = z + rows.b[row].double()
    return out


def choose(
    encoder: Encoder,
    x: torch.Tensor,
    entries: Sparse,
    owner: torch.Tensor,
    owners: int,
    limit: int,
    reach: Reach,
) -> Sparse:
    """Return the `limit` largest entries of each owner.

    Args:
        encoder: to compute close entries again.
        x: [tokens, d_in].
        entries: float32 pre-activations that may be among the largest.
        owner: [entries] int64; entries of one owner compete.
        owners: number of owners.
        limit: number of entries that each owner keeps.
        reach: the gap below which entries are close.
    """
    host, who = entries.cpu(), owner.cpu().numpy()
    token, latent, value = host.token.numpy(), host.latent.numpy(), host.value.numpy()
    gap = value - _last(who, value, limit, owners)[who]
    margin = reach.margin.cpu().numpy()[token]
    sure, near = gap > margin, np.abs(gap) <= margin
    left = limit - np.bincount(who[sure], minlength=owners)
    close = np.bincount(who[near], minlength=owners)
    open_ = np.flatnonzero(near & (close > left)[who])
    keep = sure | near
    if len(open_):
        at = torch.from_numpy(open_).to(x.device)
        exact = exactly(encoder, x, entries.token[at], entries.latent[at]).cpu().numpy()
        order = np.lexsort((latent[open_], -exact, who[open_]))
        open_ = open_[order]
        keep[open_] = _place(who[open_]) < left[who[open_]]
    return entries.pick(np.flatnonzero(keep))


def _place(who: np.ndarray) -> np.ndarray:
    """Return the index of each entry among the entries of its owner, which stand together."""
    begins = np.flatnonzero(np.diff(who, prepend=-1))
    sizes = np.diff(begins, append=len(who))
    place: np.ndarray = np.arange(len(who)) - np.repeat(begins, sizes)
    return place
