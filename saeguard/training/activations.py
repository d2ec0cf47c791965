"""Read residuals of one layer in blocks of shuffled texts; a block's position reproduces it.

A block holds the residuals of the next texts of an endless shuffled order. So a run saves only two
numbers about its data, and a run that was cut off computes its block again. Special tokens, which
serving never evaluates, are left out and counted. So are tokens of massive norm, attention sinks
(`saeguard.features.massive`): a handful of them would decide what an SAE learns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from saeguard.errors import SaeguardError
from saeguard.features.massive import MASSIVE
from saeguard.hf.model import LanguageModel
from saeguard.hf.residuals import batches, on_output, padded
from saeguard.training.texts import Chunks

SAMPLE_TOKENS = 8192
"""Tokens that the median is taken over."""
BATCH_TOKENS = 2048
"""Tokens of one forward pass, padding included."""


class Counts(NamedTuple):
    """The number of texts and tokens that went into a block."""

    texts: int = 0
    """Chunks of texts."""
    tokens: int = 0
    """Tokens that were kept."""
    special: int = 0
    massive: int = 0

    def plus(self, other: Counts) -> Counts:
        """Return the sums of both."""
        return Counts(*(a + b for a, b in zip(self, other, strict=True)))


class Block(NamedTuple):
    """Residuals in the order of the texts."""

    x: torch.Tensor
    """[rows, d_in] float32."""
    following: int
    """Position of the next block."""
    counts: Counts


class Source(Protocol):
    """Where a run's residuals come from."""

    def block(self, at: int) -> Block:
        """Return the block at a position; the first is at 0."""


@dataclass(frozen=True, slots=True)
class Streamed:
    """Residuals that are computed when a block is requested."""

    lm: LanguageModel
    layer: int
    chunks: Chunks
    seed: int
    rows: int
    """Tokens of a block, or a few more."""
    bound: float
    """Norm above which a token is left out."""

    def block(self, at: int) -> Block:
        """Compute the block that begins with the text at position `at`."""
        texts: list[np.ndarray] = []
        size = 0
        while size < self.rows:
            texts.append(self.chunks.shuffled(at + len(texts), self.seed))
            size += len(texts[-1])
        x, kept, special = read_residuals(self.lm, self.layer, texts)
        massive = kept & ~(x.norm(dim=1) <= self.bound)
        x = x[kept & ~massive]
        counts = Counts(len(texts), len(x), int(special.sum()), int(massive.sum()))
        return Block(x, at + len(texts), counts)


def norm_bound(lm: LanguageModel, layer: int, chunks: Chunks, seed: int) -> float:
    """Return the norm above which tokens of this layer are massive."""
    texts: list[np.ndarray] = []
    while sum(map(len, texts)) < SAMPLE_TOKENS and len(texts) < len(chunks):
        texts.append(chunks.shuffled(len(texts), seed))
    x, kept, _ = read_residuals(lm, layer, texts)
    return MASSIVE * float(x[kept].norm(dim=1).median())


@torch.no_grad()
def read_residuals(
    lm: LanguageModel, layer: int, texts: Sequence[np.ndarray]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return `resid_post` of `layer` at each token, and which tokens to keep.

    Returns:
        x [tokens, d_in] float32 on the CPU, kept [tokens] bool, special [tokens] bool.
    """
    lengths = [len(text) for text in texts]
    starts = np.cumsum([0, *lengths])
    x = torch.empty(int(starts[-1]), lm.hidden_size)
    for rows, states in _forward(lm, layer, texts):
        for row, i in enumerate(rows):
            x[starts[i] : starts[i + 1]] = states[row, : lengths[i]].float().cpu()
    special = torch.from_numpy(np.isin(np.concatenate(texts), lm.special_tokens))
    return x, ~special & x.isfinite().all(1), special


def _forward(
    lm: LanguageModel, layer: int, texts: Sequence[np.ndarray]
) -> Iterator[tuple[list[int], torch.Tensor]]:
    """Yield the indices of a batch's texts, and their residuals [texts, tokens, d_in]."""
    device = next(lm.model.parameters()).device
    taken: list[torch.Tensor] = []
    with on_output(lm, layer, _stop_with(taken)):
        for rows in batches([len(text) for text in texts], BATCH_TOKENS):
            ids, mask = padded([texts[i].tolist() for i in rows])
            with suppress(_Reached):
                lm.model.base_model(
                    input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False
                )
            yield rows, taken.pop()


class _Reached(SaeguardError):  # noqa: N818 - not an error
    """Raised when the wanted layer has been computed, so that later layers are not."""


def _stop_with(taken: list[torch.Tensor]) -> Callable[[torch.Tensor], Any]:
    def stop(x: torch.Tensor) -> torch.Tensor:
        taken.append(x)
        raise _Reached

    return stop
