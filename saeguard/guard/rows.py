"""The layout of one forward pass: which request and position each row belongs to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

NO_SLOT = 0
"""The slot of padding, warm-up and capture rows: nothing is ever enforced there."""


@dataclass(frozen=True, slots=True)
class Rows:
    """Persistent per-row buffers that the op reads, so that captured graphs stay valid.

    `slot`, `position` and `offset` are [max_tokens] int64; `watched` is [max_tokens] bool.
    """

    slot: torch.Tensor
    """The request's slot in the clamp state; `NO_SLOT` for padding."""
    position: torch.Tensor
    """The token's position in its request, from 0."""
    offset: torch.Tensor
    """The row's distance from the first row of its request in this pass."""
    watched: torch.Tensor
    """False for tokens that are excluded by id, such as BOS."""
    place: torch.Tensor
    """[max_tokens] int64, index into `PLACES`: whose turn of the prompt, or the output."""
    staging: torch.Tensor
    """[3, max_tokens] int64 on the host, pinned where there is a GPU: slots, offsets, places."""


def allocate_rows(max_tokens: int, device: torch.device) -> Rows:
    """Allocate the layout for passes of up to `max_tokens` rows, padding included."""
    layout = torch.zeros(4, max_tokens, dtype=torch.int64, device=device)
    return Rows(
        slot=layout[0],
        position=layout[1],
        offset=layout[2],
        watched=torch.ones(max_tokens, dtype=torch.bool, device=device),
        place=layout[3],
        staging=torch.zeros(3, max_tokens, dtype=torch.int64, pin_memory=device.type == "cuda"),
    )


def lay_out(
    rows: Rows,
    slots: Sequence[int],
    query_start: np.ndarray,
    positions: torch.Tensor,
    place: np.ndarray,
) -> None:
    """Write the layout of the next pass.

    Args:
        rows: the buffers.
        slots: one per request, in row order.
        query_start: [requests + 1] first row of each request, then the number of rows.
        positions: [rows] int64 on the device, where the engine keeps them exact even when the
            host has to guess how many drafts were accepted.
        place: [rows] indices into `PLACES`. That of a draft is the output's, whatever its position.
    """
    counts = np.diff(query_start)
    total = int(query_start[-1])
    host = rows.staging.numpy()
    host[0, :total] = np.repeat(np.asarray(slots, np.int64), counts)
    host[0, total:] = NO_SLOT
    host[1, :total] = np.arange(total) - np.repeat(query_start[:-1], counts)
    host[1, total:] = 0
    host[2, :total] = place
    rows.slot.copy_(rows.staging[0], non_blocking=True)
    rows.offset.copy_(rows.staging[1], non_blocking=True)
    rows.place.copy_(rows.staging[2], non_blocking=True)
    rows.position[:total] = positions
