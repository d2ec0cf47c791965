"""Draw random latents that fire as often as the clamped ones and whose edit is as strong.

A control must differ from the clamp in its directions only. Each clamped latent gets a stand-in
among the latents whose firing rate is nearest to its own. Edits that set a value are scaled so that
the mean norm of the control's edit equals that of the clamp, on the same tokens. Edits that only
remove activation cannot be scaled; there, the stand-in is drawn among the nearest in mean
activation too, and the norm is reported.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from saeguard.sae import SaeInfo, encode_full, read_decoder_rows

NEAREST = 40
"""How many latents a stand-in is drawn from."""
ALIVE = 1e-5
"""Share of tokens on which a latent has to fire to be drawn."""


@dataclass(frozen=True, slots=True)
class Usual:
    """How often each latent of an SAE fires on ordinary text, and how strongly."""

    rate: np.ndarray
    """[d_sae] share of tokens on which it fires."""
    mean: np.ndarray
    """[d_sae] mean activation where it fires; 0 if it never does."""
    norm: np.ndarray
    """[d_sae] norm of its decoder row."""


def usual_activity(info: SaeInfo, x: torch.Tensor) -> Usual:
    """Return the activity of every latent on the residuals `x` [tokens, d_in]."""
    fired = encode_full(info, x).cpu()
    latent, value = fired.latent.numpy(), fired.value.numpy()
    count = np.bincount(latent, minlength=info.d_sae)
    total = np.bincount(latent, value, minlength=info.d_sae)
    norm = read_decoder_rows(info, list(range(info.d_sae))).norm(dim=1).numpy()
    return Usual(count / max(1, len(x)), total / np.maximum(count, 1), norm)


def draw(
    usual: Usual, latents: Sequence[int], taken: Collection[int], rng: np.random.Generator
) -> tuple[int, ...]:
    """Return a stand-in for each of `latents`, none of them in `taken`, all different.

    Raises:
        ValueError: too few latents fire on the texts.
    """
    alive = np.setdiff1d(np.flatnonzero(usual.rate > ALIVE), [*taken, *latents])
    if len(alive) < 2 * len(latents):
        raise ValueError(f"{len(alive)} latents fire on the texts, for {len(latents)} stand-ins")
    strength = usual.mean * usual.norm
    found: list[int] = []
    for latent in latents:
        free = np.setdiff1d(alive, found)
        rate = np.abs(np.log(usual.rate[free] / max(usual.rate[latent], ALIVE)))
        near = free[np.argsort(rate, kind="stable")[: 4 * NEAREST]]
        gap = np.abs(np.log(strength[near] / max(strength[latent], float(strength[near].min()))))
        near = near[np.argsort(gap, kind="stable")[:NEAREST]]
        found.append(int(rng.choice(near)))
    return tuple(found)


def scale_to_norm(
    usual: Usual,
    latents: Sequence[int],
    f: torch.Tensor,
    W_dec: torch.Tensor,
    norm: float,
    scale: torch.Tensor | None = None,
) -> dict[int, float]:
    """Return the activations that `latents` are set to, so that the edit's mean norm is `norm`.

    All are set to one multiple of their usual activation. The norm grows with the multiple from
    some point on, so bisection finds it (Burden and Faires, Numerical Analysis, section 2.1).

    Args:
        usual: of every latent.
        latents: to set.
        f: [tokens, latents] their activations on the tokens that are edited.
        W_dec: [latents, d_in] their decoder rows.
        norm: mean norm of the edit.
        scale: [tokens, 1] factor of each token's activations, if the SAE normalises tokens.
    """
    height = torch.tensor(usual.mean[list(latents)], dtype=torch.float32)

    def strength(multiple: float) -> float:
        delta = multiple * height - f
        delta = delta if scale is None else delta / scale
        return float((delta @ W_dec).norm(dim=1).mean())

    low, high = 0.0, 1.0
    while strength(high) < norm:
        low, high = high, 2 * high
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if strength(middle) < norm else (low, middle)
    return {j: float(high * h) for j, h in zip(latents, height.tolist(), strict=True)}
