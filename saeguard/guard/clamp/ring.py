"""Per-request state on the device, by position: windows, counts and averages over rows.

A forward pass brings consecutive rows of several requests. A ring holds the values of earlier
passes by position. It is long enough to go back before rejected drafts. A position that is
computed again overwrites its values. There is no loop over rows and no synchronisation with the
host.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class Here(NamedTuple):
    """The layout of a forward pass: clamp slot and position of each row, [rows] int64."""

    slot: torch.Tensor
    position: torch.Tensor
    offset: torch.Tensor
    """[rows] rows since the request's first row in this pass."""
    row: torch.Tensor


def here(slot: torch.Tensor, position: torch.Tensor, offset: torch.Tensor) -> Here:
    """Return the layout with row numbers."""
    return Here(slot, position, offset, torch.arange(len(slot), device=slot.device))


def windows(
    x: torch.Tensor, ring: torch.Tensor, at: Here, n: int, missing: torch.Tensor
) -> torch.Tensor:
    """Return [rows, n, columns]: the values at each row's position and the n - 1 before it.

    Args:
        x: [rows, columns].
        ring: [slots, size, columns] values of earlier passes.
        at: the layout.
        n: length of the windows.
        missing: [columns] or a scalar, the value at positions below 0.
    """
    back = torch.arange(n, device=x.device)
    then = at.position[:, None] - back
    earlier = ring[at.slot[:, None], then % ring.shape[1]]
    here = x[(at.row[:, None] - back).clamp(min=0)]
    window = torch.where((back <= at.offset[:, None])[..., None], here, earlier)
    return torch.where((then >= 0)[..., None], window, missing)


def before(ring: torch.Tensor, at: Here, initial: torch.Tensor) -> torch.Tensor:
    """Return [rows, columns]: the ring's value just before the request's first row in this pass."""
    last = at.position - at.offset - 1
    return torch.where((last >= 0)[:, None], ring[at.slot, last % ring.shape[1]], initial)


def write(ring: torch.Tensor, x: torch.Tensor, at: Here) -> None:
    """Write each request's last `size` rows to its ring; earlier rows would hit the same cells."""
    size, n = ring.shape[1], len(x)
    # A row is among the last `size` rows of its request if the row `size` further on is another's.
    ahead = (at.row + size).clamp(max=n - 1)
    same = (at.row + size < n) & (at.offset[ahead] == at.offset + size)
    same &= at.slot[ahead] == at.slot
    home = torch.where(same, 0, at.slot)  # slot 0 belongs to no request
    ring[home, at.position % size] = x


def counted(x: torch.Tensor, at: Here, start: torch.Tensor) -> torch.Tensor:
    """Return how many of the request's rows are true up to each row, [rows, columns] int64."""
    total = x.cumsum(0)
    first = at.row - at.offset
    return total - total[first] + x[first] + start


def latest(x: torch.Tensor, at: Here, start: torch.Tensor) -> torch.Tensor:
    """Return the position of the request's latest true row up to each row, -1 without one."""
    # The rows of one request are neighbours. A number that grows from request to request keeps the
    # running maximum of one request out of the next.
    own = ((at.row - at.offset) << 40)[:, None]
    found = torch.where(x, at.position[:, None] + 1, 0)
    return torch.maximum((own + found).cummax(0).values - own - 1, start)


def averaged(x: torch.Tensor, at: Here, decay: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
    """Return `y[t] = decay * y[t-1] + (1 - decay) * x[t]`, by doubling."""
    y = (1 - decay) * x
    step = 1
    while step < len(x):
        earlier = torch.cat([torch.zeros_like(y[:step]), y[:-step]])
        mine = (at.offset >= step)[:, None]
        y = y + torch.where(mine, decay**step * earlier, 0.0)
        step *= 2
    return y + decay ** (at.offset + 1)[:, None] * start


def highest(x: torch.Tensor, at: Here, start: torch.Tensor) -> torch.Tensor:
    """Return the request's highest value up to each row, by doubling."""
    step = 1
    while step < len(x):
        earlier = torch.cat([x[:step], x[:-step]])
        x = torch.where((at.offset >= step)[:, None], torch.maximum(x, earlier), x)
        step *= 2
    return torch.maximum(x, start)
