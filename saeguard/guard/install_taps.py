"""Put a watch list's encoder rows into taps on the model's device, and change them later."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch

from saeguard.guard.clamp import state as clamping
from saeguard.guard.forward_pass import allocate_rows
from saeguard.guard.host_loop import host_loop
from saeguard.guard.kernels.topk_buffers import allocate_buffers
from saeguard.guard.tap import TAPS, Kernels, Tap
from saeguard.guard.topk import make_ranked, set_floor
from saeguard.guard.watchlist import Hook, WatchList, clamps_digest
from saeguard.sae.rows import EncoderRows


class Write(NamedTuple):
    """Encoder rows to write into columns of one layer's tap, as arrays that can be pickled."""

    layer: int
    columns: np.ndarray
    """[encoder rows] int64, within the layer."""
    rows: Mapping[str, np.ndarray]
    """By name of a `Hook`'s tensor: [encoder rows, ...]. The name `screen` holds screen thresholds
    of latents that fire by rank; they can lower those in the tap, never raise them."""


def install_taps(
    watchlist: WatchList,
    *,
    max_tokens: int,
    slots: int,
    device: torch.device,
    hooks: Sequence[Hook] | None = None,
) -> tuple[Tap, ...]:
    """Put the watch list's encoder rows and clamps on `device`, one tap per layer.

    Args:
        watchlist: the compiled policies.
        max_tokens: rows of the largest forward pass, padding included.
        slots: requests that can be in flight at once; clamp slot 0 is added for padding rows.
        device: of the model.
        hooks: those of this pipeline stage; None for all.
    """
    TAPS.clear()
    rows = allocate_rows(max_tokens, device)
    kernels = kernels_for(device)
    buffers = None if kernels is None else partial(allocate_buffers, max_tokens=max_tokens)
    for hook in watchlist.hooks if hooks is None else hooks:
        encoder_rows = EncoderRows(hook.W, hook.b, hook.theta).to(device)
        W, b, theta = encoder_rows.W, encoder_rows.b, encoder_rows.theta
        floor, plain = theta.clone(), hook.norm is None and not hook.ranked
        f = torch.zeros(max_tokens, len(b) + 1, device=device)
        halves = torch.ones((), device=device)
        TAPS[hook.layer] = tap = Tap(
            layer=hook.layer,
            W=W.t(),
            b=b,
            theta=theta,
            floor=floor,
            f=f,
            halves=halves,
            ticks=torch.zeros((), dtype=torch.int64, device=device),
            rows=rows,
            clamps={},
            norm=None if hook.norm is None else hook.norm.to(device),
            kernels=kernels,
            loop=host_loop(W, b, floor, halves, f) if plain and kernels is None else None,
            scale=None
            if hook.norm is None or kernels is None
            else torch.zeros(max_tokens, len(b) + 1, device=device),
            ranked=tuple(
                make_ranked(part, encoder_rows, device, allocate_buffers=buffers)
                for part in hook.ranked
            ),
        )
        set_floors(tap)
    clamps = clamps_digest(watchlist)
    if clamps:
        add_clamps(TAPS.values(), clamps, watchlist, slots=slots)
    return tuple(TAPS.values())


def kernels_for(device: torch.device) -> Kernels | None:
    """Return the Triton launches, None if the device is no GPU or Triton is not installed."""
    if device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return None
    tap = importlib.import_module("saeguard.guard.kernels.tap")
    topk = importlib.import_module("saeguard.guard.kernels.topk")
    return Kernels(tap.read, tap.edit, topk.apply_topk)


def add_clamps(taps: Iterable[Tap], digest: str, watchlist: WatchList, *, slots: int) -> None:
    """Add a watch list's clamps to the taps of its layers, for requests that it judges."""
    hooks = {hook.layer: hook for hook in watchlist.hooks}
    rows = {clamp.layer: clamp for clamp in watchlist.clamps}
    for tap in taps:
        if tap.layer in rows:
            tap.clamps[digest] = clamping.make_clamp(
                watchlist,
                rows[tap.layer],
                hooks[tap.layer],
                slots=slots + 1,
                max_tokens=len(tap.f),
                device=tap.f.device,
                launch=None if tap.kernels is None else tap.kernels.edit,
            )


def set_floors(tap: Tap) -> None:
    """Write the floor of each latent, the activation from which the tap reports it."""
    tap.floor.copy_(tap.theta)
    for ranked in tap.ranked:
        set_floor(ranked, tap.floor)


def write_rows(taps: Iterable[Tap], write: Write) -> None:
    """Write encoder rows into columns that no watch list reads yet; the buffers stay in place."""
    for tap in taps:
        if tap.layer == write.layer:
            columns = torch.from_numpy(write.columns).to(tap.W.device)
            if tap.norm is not None and "W" in write.rows:
                tap.norm[columns] = 0  # unless `write.rows` holds a norm
            for name, rows in write.rows.items():
                values = torch.from_numpy(rows).to(tap.W.device)
                if name == "screen":
                    _lower_screen(tap, columns, values)
                    continue
                held = tap.W.t() if name == "W" else getattr(tap, name)
                held[columns] = values.to(held.dtype)
            set_floors(tap)


def _lower_screen(tap: Tap, columns: torch.Tensor, screen: torch.Tensor) -> None:
    """Lower screen thresholds to `screen`; never raise one, since older versions still need it."""
    for ranked in tap.ranked:
        mine = (columns >= ranked.columns.start) & (columns < ranked.columns.stop)
        at = columns[mine] - ranked.columns.start
        ranked.screen[at] = torch.minimum(ranked.screen[at], screen[mine])
