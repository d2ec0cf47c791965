"""One forward pass: the layout of its rows, which the tap reads, and what the tap read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from saeguard.guard.host_arrays import array_of

NO_SLOT = 0
"""The clamp slot of padding, warm-up and capture rows; no policy is enforced in it."""


@dataclass(frozen=True, slots=True)
class Rows:
    """Persistent per-row buffers that the tap's op reads, so that captured graphs stay valid.

    `clamp_slot`, `position` and `offset` are [max_tokens] int64; `eligible` is [max_tokens] bool.
    """

    clamp_slot: torch.Tensor
    """The worker's index of the request in the clamp state; `NO_SLOT` for padding."""
    position: torch.Tensor
    """The token's position in its request, from 0."""
    offset: torch.Tensor
    """The row's distance from the first row of its request in this pass."""
    eligible: torch.Tensor
    """False for tokens that are excluded by id, such as BOS."""
    role: torch.Tensor
    """[max_tokens] int64, index into `ROLES`: which role wrote the token."""
    layout: torch.Tensor
    """[4, max_tokens] int64: clamp slots, offsets, roles and positions, as one tensor."""
    staging: torch.Tensor
    """[3, max_tokens] int64 on the host, pinned if there is a GPU: clamp slots, offsets, roles."""


def allocate_rows(max_tokens: int, device: torch.device) -> Rows:
    """Allocate the row buffers for passes of up to `max_tokens` rows, padding included."""
    layout = torch.zeros(4, max_tokens, dtype=torch.int64, device=device)
    return Rows(
        clamp_slot=layout[0],
        position=layout[3],
        offset=layout[1],
        eligible=torch.ones(max_tokens, dtype=torch.bool, device=device),
        role=layout[2],
        layout=layout,
        staging=torch.zeros(3, max_tokens, dtype=torch.int64, pin_memory=device.type == "cuda"),
    )


def lay_out(
    rows: Rows,
    slots: Sequence[int],
    query_start: np.ndarray,
    positions: torch.Tensor,
    role: np.ndarray,
) -> None:
    """Write the layout of the next forward pass to the row buffers.

    Args:
        rows: the buffers.
        slots: clamp slot of each request, in row order.
        query_start: [requests + 1] first row of each request, then the number of rows.
        positions: [rows or more] int64 on the device, where they are exact. The host may not know
            yet how many drafts were accepted.
        role: [rows] indices into `ROLES`; a draft has the role `output`, whatever its position.
    """
    counts = np.diff(query_start)
    total = int(query_start[-1])
    on_host = rows.position.is_cpu
    host = array_of(rows.layout if on_host else rows.staging)
    host[0, :total] = np.repeat(np.asarray(slots, np.int64), counts)
    host[0, total:] = NO_SLOT
    host[1, :total] = np.arange(total) - np.repeat(query_start[:-1], counts)
    host[1, total:] = 0
    host[2, :total] = role
    if on_host:
        array_of(rows.position)[:total] = array_of(positions)[:total]
        return
    rows.layout[:3].copy_(rows.staging, non_blocking=True)
    rows.position[:total] = positions[:total]


@dataclass(frozen=True, slots=True)
class ForwardPass:
    """The watched activations of one forward pass and the requests that they belong to.

    Attributes:
        request_ids: in row order.
        query_start: [requests + 1] first row of each request, then the number of rows.
        positions: [rows] position of each row's token in its request.
        eligible: [rows] bool, False for tokens excluded by id.
        f: [rows, columns] float32 activations.
        acted: [rows, clamp policies] bool, whether the clamp edited the row; None without clamps.
        ran: whether every tap ran in this pass; if not, `f` is stale and no row was read.
        watchlist: digest of the watch list that the model's process was started with.
        swaps: number of the last swap that its taps carried out before the pass.
        acted_by: `acted` by digest of the clamps, if several versions have requests in flight;
            `saeguard.reload.versions` selects that of each request.
    """

    request_ids: list[str]
    query_start: np.ndarray
    positions: np.ndarray
    eligible: np.ndarray
    f: np.ndarray
    acted: np.ndarray | None
    ran: bool
    watchlist: str
    swaps: int = 0
    acted_by: Mapping[str, np.ndarray] = field(default_factory=dict)
