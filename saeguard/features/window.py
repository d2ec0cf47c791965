"""The score of a window: evidence at the k-th best of the last n tokens."""

from __future__ import annotations

import numpy as np


def window_score(evidence: np.ndarray, k: int, n: int) -> np.ndarray:
    """Return the k-th largest of the last `n` values at each position.

    Args:
        evidence: [tokens] or [tokens, columns] float, -inf where nothing was evaluated.
        k: how many must hold.
        n: among how many.
    """
    if n == 1:
        return evidence
    pad = np.full((n - 1, *evidence.shape[1:]), -np.inf)
    windows = np.lib.stride_tricks.sliding_window_view(np.concatenate([pad, evidence]), n, axis=0)
    kth: np.ndarray = np.partition(windows, n - k, axis=-1)[..., n - k]
    return kth
