"""Neighbours of a latent by the angle of its decoder or encoder row, in its SAE or another.

A latent of a small SAE often splits into several of a larger one, whose decoder rows lie around its
own (Bricken et al. 2023, "Towards Monosemanticity", Feature splitting).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch

from saeguard.errors import InputError
from saeguard.sae import SaeInfo, read_decoder_rows, read_rows

Side = Literal["decoder", "encoder"]
BLOCK = 8192
"""Latents whose rows are in memory at once."""
NEAR = 0.7
"""Cosine from which two latents of different SAEs count as one."""


class Neighbour(NamedTuple):
    """A latent and the cosine of the angle between its row and the one asked about."""

    latent: int
    cosine: float


class Counterparts(NamedTuple):
    """For each latent of one SAE its nearest in another."""

    latent: np.ndarray
    """[d_sae] nearest by decoder row."""
    cosine: np.ndarray
    """[d_sae] float32"""


def unit_rows(info: SaeInfo, latents: Sequence[int], side: Side = "decoder") -> torch.Tensor:
    """Return rows of length 1, [latents, d_in] float32; a row of zeros stays zero.

    Raises:
        SaeError: a latent does not exist, or the SAE is a transcoder and the decoder is asked for.
    """
    rows = read_decoder_rows(info, latents) if side == "decoder" else read_rows(info, latents).W
    return torch.nn.functional.normalize(rows, dim=1)


def cosines(info: SaeInfo, directions: torch.Tensor, side: Side = "decoder") -> torch.Tensor:
    """Return the cosine of directions of length 1 [n, d_in] with every row, [n, d_sae] float32."""
    return torch.cat([directions @ rows.t() for _, rows in _blocks(info, side)], 1)


def neighbours(
    info: SaeInfo,
    latent: int,
    *,
    side: Side = "decoder",
    other: SaeInfo | None = None,
    most: int = 20,
) -> list[Neighbour]:
    """Return the latents whose rows point most nearly the way of a latent's, nearest first.

    Args:
        info: the SAE.
        latent: of it.
        side: which rows.
        other: look in this SAE instead; of the same width.
        most: how many.

    Raises:
        SaeError: there is no such latent.
        InputError: the other SAE reads vectors of another width.
    """
    among = other or info
    _check_width(info, among)
    row = cosines(among, unit_rows(info, [latent], side), side)[0]
    if other is None:
        row[latent] = -torch.inf
    values, at = row.topk(min(most, len(row) - (other is None)))
    return [Neighbour(int(i), float(v)) for i, v in zip(at, values, strict=True)]


def counterparts(
    info: SaeInfo, other: SaeInfo, done: Callable[[int], object] = lambda _count: None
) -> Counterparts:
    """Return the latent of `other` that is nearest to each latent of `info`, by decoder row.

    Args:
        info: the SAE whose latents are asked about.
        other: of the same width.
        done: called with the number of latents since the last call.

    Raises:
        InputError: the SAEs read vectors of different widths.
        SaeError: one of them is a transcoder, or damaged.
    """
    _check_width(info, other)
    latents, values = [], []
    for _, rows in _blocks(info, "decoder", 1024):
        best = torch.full((len(rows),), -torch.inf)
        at = torch.zeros(len(rows), dtype=torch.int64)
        for start, others in _blocks(other, "decoder"):
            value, index = (rows @ others.t()).max(1)
            better = value > best
            best, at = torch.where(better, value, best), torch.where(better, index + start, at)
        latents.append(at)
        values.append(best)
        done(len(rows))
    return Counterparts(torch.cat(latents).numpy(), torch.cat(values).numpy())


def flat_map(rows: torch.Tensor, seed: int = 0) -> np.ndarray:
    """Return a place on a plane for each row [n, d_in], [n, 2] float32 within -1 to 1, by UMAP.

    Near rows lie near each other; other distances mean little (McInnes et al. 2018,
    arXiv:1802.03426). The first call takes seconds, since the library compiles itself.
    """
    if len(rows) < 4:  # noqa: PLR2004 - UMAP's own least
        return np.stack([np.linspace(-1, 1, len(rows)), np.zeros(len(rows))], 1).astype(np.float32)
    import umap  # noqa: PLC0415 - takes seconds

    mapper = umap.UMAP(
        n_neighbors=min(15, len(rows) - 1), metric="cosine", random_state=seed, n_jobs=1, init="pca"
    )
    placed = np.asarray(mapper.fit_transform(rows.numpy()), np.float32)
    placed -= (placed.max(0) + placed.min(0)) / 2
    out: np.ndarray = placed / max(float(np.abs(placed).max()), 1e-9)
    return out


def _blocks(info: SaeInfo, side: Side, size: int = BLOCK) -> Iterator[tuple[int, torch.Tensor]]:
    for start in range(0, info.d_sae, size):
        yield start, unit_rows(info, range(start, min(start + size, info.d_sae)), side)


def _check_width(info: SaeInfo, other: SaeInfo) -> None:
    if info.d_in != other.d_in:
        raise InputError(
            f"{other.path}: reads vectors of width {other.d_in}, expected {info.d_in}, the width "
            f"of {info.path}; name an SAE of the same model"
        )
