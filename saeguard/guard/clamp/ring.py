"""Per-request state, by position: windows, counts and averages over rows.

A forward pass brings consecutive rows of several requests. A ring holds the values of earlier
passes by position. It is long enough to go back before rejected drafts. A position that is
computed again overwrites its values. There is no loop over rows and no synchronisation with the
host.

The functions take torch tensors on a device, and NumPy arrays on a CPU, where a call of torch takes
several times as long.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch


class Here(NamedTuple):
    """The layout of a forward pass: clamp slot and position of each row, [rows] int64."""

    slot: Any
    position: Any
    offset: Any
    """[rows] rows since the request's first row in this pass."""
    row: Any


def module_of(x: Any) -> Any:
    """Return the module whose functions take `x`: `numpy` or `torch`."""
    return np if isinstance(x, np.ndarray) else torch


def count_up(n: int, like: Any) -> Any:
    """Return the numbers from 0 to n - 1, where `like` is."""
    return np.arange(n) if isinstance(like, np.ndarray) else torch.arange(n, device=like.device)


def here(slot: Any, position: Any, offset: Any) -> Here:
    """Return the layout with row numbers."""
    return Here(slot, position, offset, count_up(len(slot), slot))


def windows(x: Any, ring: Any, at: Here, n: int, missing: Any) -> Any:
    """Return [rows, n, columns]: the values at each row's position and the n - 1 before it.

    Args:
        x: [rows, columns].
        ring: [slots, size, columns] values of earlier passes.
        at: the layout.
        n: length of the windows.
        missing: [columns] or a scalar, the value at positions below 0.
    """
    xp, back = module_of(x), count_up(n, x)
    then = at.position[:, None] - back
    earlier = ring[at.slot[:, None], then % ring.shape[1]]
    here = x[(at.row[:, None] - back).clip(0)]
    window = xp.where((back <= at.offset[:, None])[..., None], here, earlier)
    return xp.where((then >= 0)[..., None], window, missing)


def before(ring: Any, at: Here, initial: Any) -> Any:
    """Return [rows, columns]: the ring's value just before the request's first row in this pass."""
    last = at.position - at.offset - 1
    return module_of(ring).where((last >= 0)[:, None], ring[at.slot, last % ring.shape[1]], initial)


def write(ring: Any, x: Any, at: Here) -> None:
    """Write each request's last `size` rows to its ring; earlier rows would hit the same cells."""
    size, n = ring.shape[1], len(x)
    # A row is among the last `size` rows of its request if the row `size` further on is another's.
    ahead = (at.row + size).clip(None, n - 1)
    same = (at.row + size < n) & (at.offset[ahead] == at.offset + size)
    same &= at.slot[ahead] == at.slot
    home = module_of(x).where(same, 0, at.slot)  # slot 0 belongs to no request
    ring[home, at.position % size] = x


def counted(x: Any, at: Here, start: Any) -> Any:
    """Return how many of the request's rows are true up to each row, [rows, columns] int64."""
    total = x.cumsum(0)
    first = at.row - at.offset
    return total - total[first] + x[first] + start


def latest(x: Any, at: Here, start: Any) -> Any:
    """Return the position of the request's latest true row up to each row, -1 without one."""
    # The rows of one request are neighbours. A number that grows from request to request keeps the
    # running maximum of one request out of the next.
    xp = module_of(x)
    own = ((at.row - at.offset) << 40)[:, None]
    found = xp.where(x, at.position[:, None] + 1, 0)
    up_to = own + found
    most = np.maximum.accumulate(up_to) if xp is np else up_to.cummax(0).values
    return xp.maximum(most - own - 1, start)


def averaged(x: Any, at: Here, decay: Any, start: Any) -> Any:
    """Return `y[t] = decay * y[t-1] + (1 - decay) * x[t]`, by doubling."""
    xp, y, step = module_of(x), (1 - decay) * x, 1
    while step < len(x):
        earlier = xp.concatenate([xp.zeros_like(y[:step]), y[:-step]])
        mine = (at.offset >= step)[:, None]
        y = y + xp.where(mine, decay**step * earlier, 0.0)
        step *= 2
    return y + decay ** (at.offset + 1)[:, None] * start


def highest(x: Any, at: Here, start: Any) -> Any:
    """Return the request's highest value up to each row, by doubling."""
    xp, step = module_of(x), 1
    while step < len(x):
        earlier = xp.concatenate([x[:step], x[:-step]])
        x = xp.where((at.offset >= step)[:, None], xp.maximum(x, earlier), x)
        step *= 2
    return xp.maximum(x, start)
