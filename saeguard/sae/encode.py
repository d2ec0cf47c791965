"""Encode every latent, block by block, so that [tokens, latents] never exists as a whole.

For search, calibration and forensics. A block's pre-activations stay in the processor's cache:
they are compared with thresholds there, and only what fires leaves it. Products and comparisons
are float32; half-precision weights and residuals are widened first, exactly, so a result differs
from that of exact arithmetic on the same numbers by at most `gamma * |x| * |w|`, with
`gamma = (d_in + 4) * 2**-24` (Higham 2002, Accuracy and Stability, section 3.1). Which latents
TopK keeps does not depend on that at all: see `saeguard.sae.topk_all`.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from saeguard.sae.checkpoint_info import Norm, SaeInfo
from saeguard.sae.encoder import FEW, Encoder, open_encoder, product, token_scale, worth_a_copy
from saeguard.sae.errors import SaeError
from saeguard.sae.rows import EncoderRows
from saeguard.sae.sparse import Sparse, above, concatenate
from saeguard.sae.topk_all import GroupMaxSearch, TopKSearch, largest

ROWS = 512
"""Tokens per block."""
ELEMENTS = 1 << 21
"""Pre-activations per block: 8 MiB."""
FILE_BLOCK = 8192
"""Highest number of latents that are read from a file at once."""


@dataclass(frozen=True, slots=True)
class Block:
    """The pre-activations of some tokens and latents."""

    token: int
    """The first token."""
    latent: int
    """The first latent."""
    z: torch.Tensor
    """[tokens, latents] float32; the next block overwrites it."""
    rows: EncoderRows


def activate(rows: EncoderRows, x: torch.Tensor, norm: Norm = "none") -> torch.Tensor:
    """Return activations [tokens, latents] float32 of `x` [tokens, d_in], without TopK."""
    x = x.float()
    pre = product(rows, x, token_scale(norm, x))
    return pre * (pre > rows.theta)


@torch.no_grad()
def products(
    encoder: Encoder, x: torch.Tensor, *, block: int | None = None, rows: int = ROWS
) -> Iterator[Block]:
    """Yield the pre-activations of all of `x` [tokens, d_in], latents outside, tokens inside.

    Args:
        encoder: each of its blocks is read once.
        x: any floating dtype.
        block: latents per block; by default so many that a block stays in cache.
        rows: tokens per block.
    """
    rows = max(1, min(rows, len(x)))
    if block is None:
        block = max(2048, ELEMENTS // rows)
        block = block if encoder.in_memory else min(block, FILE_BLOCK)
    block = min(block, encoder.d_sae)
    if encoder.groups:  # whole groups
        block = max(1, block // encoder.group) * encoder.group
    chunks = [x[first : first + rows].float() for first in range(0, len(x), rows)]
    scales = [token_scale(encoder.norm, chunk) for chunk in chunks]
    # One memory for all: a new one would cost more than what is done in it.
    out = torch.empty(rows * block, device=x.device)
    for start in range(0, encoder.d_sae, block):
        part = encoder.block(start, min(start + block, encoder.d_sae))
        W = part.W.float()
        if worth_a_copy(W, len(x)):
            W = W.t().contiguous().t()
        part = EncoderRows(W, part.b, part.theta).to(x.device)
        for i, (chunk, scale) in enumerate(zip(chunks, scales, strict=True)):
            z = out[: len(chunk) * len(W)].view(len(chunk), len(W))
            yield Block(i * rows, start, product(part, chunk, scale, z), part)


def encode_blocks(
    source: SaeInfo | Encoder, x: torch.Tensor, *, block: int | None = None, rows: int = ROWS
) -> Iterator[tuple[int, int, torch.Tensor]]:
    """Yield `(first token, first latent, f)` for all of `x` [tokens, d_in].

    Each block of latents is read once; `f` is [tokens, latents] float32.

    Raises:
        SaeError: the weights are damaged.
        ValueError: the latents compete with each other, so that no block is complete by itself.
    """
    encoder = open_encoder(source)
    if encoder.k is not None:
        raise ValueError("latents of TopK and groupmax compete across blocks; use encode_full")
    for part in products(encoder, x, block=block, rows=rows):
        yield part.token, part.latent, part.z * (part.z > part.rows.theta)


def encode_full(
    source: SaeInfo | Encoder, x: torch.Tensor, *, block: int | None = None, rows: int = ROWS
) -> Sparse:
    """Return every active latent of `x` [tokens, d_in]; memory grows with the entries.

    Raises:
        SaeError: the weights are damaged.
        SaeError: a token is not finite, so its activations mean nothing.
    """
    encoder = open_encoder(source)
    # A sum is one pass, and finite unless a token is not, or unless it overflows itself.
    if not math.isfinite(x.sum()):
        bad = ~torch.isfinite(x).all(1)
        if bad.any():
            raise SaeError(f"token {int(bad.nonzero()[0])} is not finite (NaN or infinite)")
    if x.is_cuda and not encoder.groups and importlib.util.find_spec("triton") is not None:
        wide = importlib.import_module("saeguard.sae.encode_triton")
        on_gpu: Sparse = wide.encode_on_gpu(encoder, x)
        return on_gpu
    if encoder.k is not None:
        if len(x) < FEW and encoder.in_memory and not encoder.groups and block is None:
            (part,) = products(encoder, x, block=encoder.d_sae)
            found = largest(encoder, x, part.z, part.rows)
            if found is not None:
                return found
        search = GroupMaxSearch(encoder, x) if encoder.groups else TopKSearch(encoder, x)
        for part in products(encoder, x, block=block, rows=rows):
            search.enter(part.token, part.latent, part.z, part.rows)
        return search.decide()
    parts = products(encoder, x, block=block, rows=rows)
    fired = [above(part.z, part.rows.theta, part.token, part.latent) for part in parts]
    return concatenate(fired, x.device)


def what_fired(
    source: SaeInfo | Encoder, x: torch.Tensor, *, most: int = 20
) -> list[list[tuple[int, float]]]:
    """Return each token's `most` strongest latents with their activations, strongest first.

    The question of forensics: what else fired on the tokens `x` [tokens, d_in]?

    Raises:
        SaeError, ValueError: as `encode_full`.
    """
    found = encode_full(source, x).cpu()
    order = np.lexsort((found.latent.numpy(), -found.value.numpy(), found.token.numpy()))
    out: list[list[tuple[int, float]]] = [[] for _ in range(len(x))]
    for i in order.tolist():
        entries = out[int(found.token[i])]
        if len(entries) < most:
            entries.append((int(found.latent[i]), float(found.value[i])))
    return out


def max_per_text(source: SaeInfo | Encoder, x: torch.Tensor, lengths: Sequence[int]) -> np.ndarray:
    """Return each latent's largest activation in each text, [texts, d_sae] float32.

    Args:
        source: the SAE.
        x: [tokens, d_in], the texts one after the other.
        lengths: tokens of each text; their sum is the number of tokens. A text without tokens
            gets zeros.
    """
    encoder = open_encoder(source)
    owner = np.repeat(np.arange(len(lengths)), lengths)
    if len(owner) != len(x):
        raise ValueError(f"lengths add up to {len(owner)}, but there are {len(x)} tokens")
    out = np.zeros((len(lengths), encoder.d_sae), np.float32)
    if encoder.k is not None:
        found = encode_full(encoder, x).cpu()
        np.maximum.at(out, (owner[found.token], found.latent.numpy()), found.value.numpy())
        return out
    for first, start, f in encode_blocks(encoder, x):
        texts = owner[first : first + len(f)]
        begins = np.flatnonzero(np.diff(texts, prepend=-1))
        peak = np.maximum.reduceat(f.numpy(), begins, axis=0)
        at = texts[begins]
        # A text may continue from the block of tokens before this one.
        columns = slice(start, start + f.shape[1])
        out[at, columns] = np.maximum(out[at, columns], peak)
    return out
