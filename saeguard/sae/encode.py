"""Encode every latent, block by block, so that [tokens, latents] never exists as a whole."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from saeguard.sae.info import SaeInfo
from saeguard.sae.rows import EncoderRows, read_block, require_rowwise

BLOCK = 4096
"""Latents per block."""
ROWS = 2048
"""Tokens per block."""


@dataclass(frozen=True, slots=True)
class Sparse:
    """What fired: one entry per token and active latent, in the order of latent blocks."""

    token: torch.Tensor
    """[entries] int64."""
    latent: torch.Tensor
    """[entries] int64."""
    value: torch.Tensor
    """[entries] float32, positive."""


def activate(rows: EncoderRows, x: torch.Tensor) -> torch.Tensor:
    """Return activations [tokens, latents] of `x` [tokens, d_in], in float32."""
    pre = torch.addmm(rows.b, x.float(), rows.W.t())
    return (pre > rows.theta) * torch.addcmul(rows.shift, rows.scale, pre)


def encode_blocks(
    info: SaeInfo, x: torch.Tensor, *, block: int = BLOCK, rows: int = ROWS
) -> Iterator[tuple[int, int, torch.Tensor]]:
    """Yield `(first token, first latent, f)` for all of `x` [tokens, d_in].

    Each block of latents is read from the file once; `f` is [<= rows, <= block] float32.

    Raises:
        SaeError: the architecture is not supported or the weights are damaged.
    """
    require_rowwise(info)
    for start in range(0, info.d_sae, block):
        encoder = read_block(info, start, min(start + block, info.d_sae))
        for first in range(0, len(x), rows):
            yield first, start, activate(encoder, x[first : first + rows])


def encode_full(info: SaeInfo, x: torch.Tensor) -> Sparse:
    """Return every active latent of `x` [tokens, d_in]."""
    tokens, latents, values = [], [], []
    for first, start, f in encode_blocks(info, x):
        token, latent = torch.nonzero(f, as_tuple=True)
        tokens.append(token + first)
        latents.append(latent + start)
        values.append(f[token, latent])
    if not tokens:
        return Sparse(*(torch.empty(0, dtype=t) for t in (torch.int64, torch.int64, torch.float32)))
    return Sparse(torch.cat(tokens), torch.cat(latents), torch.cat(values))


def max_per_text(info: SaeInfo, x: torch.Tensor, lengths: Sequence[int]) -> np.ndarray:
    """Return each latent's largest activation in each text, [texts, d_sae] float32.

    Args:
        info: the SAE.
        x: [tokens, d_in], the texts one behind the other.
        lengths: tokens of each text; their sum is the number of tokens. A text without tokens
            gets zeros.
    """
    owner = np.repeat(np.arange(len(lengths)), lengths)
    if len(owner) != len(x):
        raise ValueError(f"lengths add up to {len(owner)}, but there are {len(x)} tokens")
    out = np.zeros((len(lengths), info.d_sae), np.float32)
    for first, start, f in encode_blocks(info, x):
        texts = owner[first : first + len(f)]
        begins = np.flatnonzero(np.diff(texts, prepend=-1))
        peak = np.maximum.reduceat(f.numpy(), begins, axis=0)
        at = texts[begins]
        # A text may continue from the block of tokens before this one.
        columns = slice(start, start + f.shape[1])
        out[at, columns] = np.maximum(out[at, columns], peak)
    return out
