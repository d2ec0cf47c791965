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
    staging: torch.Tensor
    """[3, max_tokens] int64 on the host, pinned where there is a GPU."""


def allocate_rows(max_tokens: int, device: torch.device) -> Rows:
    """Allocate the layout for passes of up to `max_tokens` rows, padding included."""
    layout = torch.zeros(3, max_tokens, dtype=torch.int64, device=device)
    return Rows(
        slot=layout[0],
        position=layout[1],
        offset=layout[2],
        watched=torch.ones(max_tokens, dtype=torch.bool, device=device),
        staging=torch.zeros(3, max_tokens, dtype=torch.int64, pin_memory=device.type == "cuda"),
    )


def lay_out(rows: Rows, slots: Sequence[int], starts: np.ndarray, query_start: np.ndarray) -> None:
    """Write the layout of the next pass.

    Args:
        rows: the buffers.
        slots: one per request, in row order.
        starts: [requests] position of each request's first row.
        query_start: [requests + 1] first row of each request, then the number of rows.
    """
    counts = np.diff(query_start)
    total = int(query_start[-1])
    host = rows.staging.numpy()
    host[0, :total] = np.repeat(np.asarray(slots, np.int64), counts)
    host[0, total:] = NO_SLOT
    host[2, :total] = np.arange(total) - np.repeat(query_start[:-1], counts)
    host[1, :total] = np.repeat(starts, counts) + host[2, :total]
    for i, target in enumerate((rows.slot, rows.position, rows.offset)):
        target.copy_(rows.staging[i], non_blocking=True)
