"""Choose which texts of a latent are shown: the strongest, and some of each band."""

from __future__ import annotations

import numpy as np

TOP = 20
"""Texts of the highest band, band 0: the strongest of all."""
BANDS = ((0.0, 0.1), (0.1, 0.25), (0.25, 0.5), (0.5, 0.75), (0.75, 1.0))
"""Bands 1, 2, ... by rank among the texts in which the latent fires, strongest first."""
PER_BAND = 5


def choose(latent: np.ndarray, text: np.ndarray, value: np.ndarray) -> tuple[np.ndarray, ...]:
    """Return which peaks are shown: index, band and place in it, three arrays [shown].

    A band shows `PER_BAND` texts, evenly spaced by rank; one that the top shows is not repeated.

    Args:
        latent: [peaks], in any order.
        text: [peaks]; of equal activations the text with the lower number is first.
        value: [peaks] highest activation of the latent in the text.
    """
    order = np.lexsort((text, -value, latent))
    starts = np.flatnonzero(np.diff(latent[order], prepend=-1))
    sizes = np.diff(starts, append=len(order))
    rank = np.arange(len(order)) - np.repeat(starts, sizes)
    top = np.flatnonzero(rank < TOP)
    index, band, place = [order[top]], [np.zeros(len(top), np.int32)], [rank[top]]
    for number, (low, high) in enumerate(BANDS, 1):
        wanted = low + (high - low) * (np.arange(PER_BAND) + 0.5) / PER_BAND
        ranks = np.floor(sizes[:, None] * wanted).astype(np.int64)
        fresh = ranks >= TOP
        fresh[:, 1:] &= ranks[:, 1:] != ranks[:, :-1]
        row, column = np.nonzero(fresh)
        index.append(order[starts[row] + ranks[row, column]])
        band.append(np.full(len(row), number, np.int32))
        place.append(column)
    return np.concatenate(index), np.concatenate(band), np.concatenate(place).astype(np.int32)


def band_name(band: int) -> str:
    """Return the words for a band."""
    if not band:
        return "strongest"
    low, high = BANDS[band - 1]
    return f"{low:.0%} to {high:.0%} of the texts, strongest first"
