"""Compare the measured L0 with the published one, to check that a checkpoint is read correctly.

A wrong layer, scale, bias or threshold changes the L0 by a factor; so does another model.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from saeguard.sae.checkpoint_info import SaeInfo
from saeguard.sae.encode import encode_full
from saeguard.sae.files import read_json

NEAR, FAR = 2.0, 4.0
"""Ratios of measured to published L0: texts explain one up to `NEAR`, nothing one above `FAR`."""

_NAMED = re.compile(r"average_l0_(\d+)")


@dataclass(frozen=True, slots=True)
class L0:
    """Statistics of the number of latents that are active on a token."""

    mean: float
    median: float
    tokens: int
    published: float | None
    k: int | None = None
    """Number of latents that a TopK SAE keeps on any token."""

    @property
    def verdict(self) -> str:
        """The result of the comparison, in one sentence."""
        if self.published is None and self.k is not None:
            return by_construction(self.k)
        if self.published is None:
            return "no published L0 to compare with; state one with --l0"
        ratio = max(self.mean, 1e-9) / self.published
        if 1 / NEAR <= ratio <= NEAR:
            return f"as published, about {self.published:g}: this looks like the SAE it says it is"
        if 1 / FAR <= ratio <= FAR:
            return (
                f"{ratio:.2g} times the published {self.published:g}: doubtful; are these texts "
                "like those it was trained on, and is the model the right one?"
            )
        return (
            f"{ratio:.2g} times the published {self.published:g}: this does not look like the SAE "
            "you think it is. Check model, layer, and what is stated beside the files"
        )


def measure_l0(info: SaeInfo, x: torch.Tensor, published: float | None = None) -> L0:
    """Count the latents that fire on `x` [tokens, d_in], which holds no special tokens.

    Raises:
        SaeError: the SAE cannot be computed.
    """
    counts = torch.bincount(encode_full(info, x).token, minlength=len(x))
    if published is None:
        published = published_l0(info)
    return L0(float(counts.float().mean()), float(counts.median()), len(x), published, info.k)


def by_construction(k: int) -> str:
    """Return a sentence on what the L0 of a TopK SAE can show."""
    return (
        f"at most k = {k} on any token, whatever the model: it cannot tell whether this is the SAE "
        "you think it is; look at what fires on texts you know (`saeguard features fired`)"
    )


def published_l0(info: SaeInfo) -> float | None:
    """Return the mean L0 that a checkpoint's folder or configuration names."""
    for part in reversed(info.path.parts):
        if (match := _NAMED.fullmatch(part)) is not None:
            return float(match[1])
    if info.config is None:
        return None
    config = read_json(info.config)
    # Of Llama Scope, top_k is what the threshold was calibrated to.
    value = config.get({"gemma_scope_2": "l0", "llama_scope": "top_k"}.get(info.format, ""))
    return float(value) if isinstance(value, int | float) and value > 0 else None
