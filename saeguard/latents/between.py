"""Two SAEs of one model beside each other: what they share, and what splits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from saeguard.latents.neighbours import NEAR, counterparts
from saeguard.sae import SaeInfo

MOST_SPLIT = 10


def between(
    info: SaeInfo, other: SaeInfo, done: Callable[[int], object] = lambda _count: None
) -> dict[str, Any]:
    """Return how the latents of two SAEs correspond, by the cosine of decoder rows.

    A latent of `other` belongs to its nearest latent of `info`, if the cosine reaches `NEAR`. A
    latent of `info` to which several belong is split.

    Args:
        info: the SAE that is looked at.
        other: usually a larger one of the same layer.
        done: called with the number of latents since the last call, of both in turn.

    Raises:
        InputError: the SAEs read vectors of different widths.
        SaeError: one of them is a transcoder, or damaged.
    """
    there, back = counterparts(info, other, done), counterparts(other, info, done)
    owned = np.bincount(back.latent[back.cosine >= NEAR], minlength=info.d_sae)
    order = np.argsort(-owned, kind="stable")[:MOST_SPLIT]
    return {
        "sha256": other.sha256,
        "layer": other.layer,
        "d_sae": other.d_sae,
        "near": NEAR,
        "found_there": int((there.cosine >= NEAR).sum()),
        "found_here": int((back.cosine >= NEAR).sum()),
        "median_cosine": round(float(np.median(there.cosine)), 4),
        "latents_by_parts": {
            "0": int((owned == 0).sum()),
            "1": int((owned == 1).sum()),
            "2 or more": int((owned > 1).sum()),
        },
        "most_split": [
            {"latent": int(i), "parts": np.flatnonzero(
                (back.latent == i) & (back.cosine >= NEAR)
            ).tolist()}
            for i in order
            if owned[i] > 1
        ],
    }  # fmt: skip
