"""Find latents by prompts: strongest, specific, on in all of these and off in all of those.

The method of Templeton et al. 2024 ("Scaling Monosemanticity", Targeted features): latents that
fire on one prompt, or on all of several, less those that fire on contrasting ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from saeguard.hf.on_prompt import OnPrompt
from saeguard.latents.index import Index


@dataclass(frozen=True, slots=True)
class Found:
    """A latent that fires on every prompt that it should, and on no other."""

    latent: int
    value: float
    """Its highest activation in the prompt in which that is lowest."""
    peaks: tuple[tuple[float, int], ...]
    """For each prompt its highest activation, and where."""
    background: float | None = None
    """Share of background tokens on which it is as strong as `value`; None without a background."""


def find(
    prompts: Sequence[OnPrompt],
    without: Sequence[OnPrompt] = (),
    *,
    index: Index | None = None,
    background: Sequence[OnPrompt] = (),
) -> list[Found]:
    """Return the latents that fire in all of `prompts` and in none of `without`, strongest first.

    Args:
        prompts: at least one.
        without: prompts in which the latents must not fire.
        index: its corpus is the background; shares are counted to a quarter of an octave.
        background: texts that are the background in place of an index, counted exactly.
    """
    peaks = [prompt.peaks() for prompt in prompts]
    shared = set.intersection(*(set(p) for p in peaks))
    for prompt in without:
        shared -= set(prompt.latent.tolist())
    found = [
        Found(latent, min(p[latent][0] for p in peaks), tuple(p[latent] for p in peaks))
        for latent in sorted(shared)
    ]
    found.sort(key=lambda f: -f.value)
    latents, values = [f.latent for f in found], [f.value for f in found]
    shares: np.ndarray | None = None
    if background:
        shares = _above(background, latents, values)
    elif index is not None:
        shares = index.above(latents, values)
    if shares is None:
        return found
    return [
        Found(f.latent, f.value, f.peaks, float(share))
        for f, share in zip(found, shares, strict=True)
    ]


def specific(found: Sequence[Found]) -> list[Found]:
    """Return the latents, those first that are so strong on the fewest background tokens."""
    return sorted(found, key=lambda f: (f.background or 0.0, -f.value))


def by_position(prompt: OnPrompt, most: int) -> list[list[tuple[int, float]]]:
    """Return the strongest latents of each token, strongest first."""
    out: list[list[tuple[int, float]]] = [[] for _ in prompt.pieces]
    for i in np.lexsort((prompt.latent, -prompt.value, prompt.token)).tolist():
        entries = out[int(prompt.token[i])]
        if len(entries) < most:
            entries.append((int(prompt.latent[i]), float(prompt.value[i])))
    return out


def _above(
    texts: Sequence[OnPrompt], latents: Sequence[int], values: Sequence[float]
) -> np.ndarray:
    latent = np.concatenate([t.latent for t in texts])
    value = np.concatenate([t.value for t in texts])
    tokens = sum(int(t.looked.sum()) for t in texts)
    counts = [
        int(((latent == wanted) & (value >= least)).sum())
        for wanted, least in zip(latents, values, strict=True)
    ]
    return np.array(counts) / tokens
