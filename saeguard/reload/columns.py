"""Assign the columns of the taps to encoder rows, so that a watch list can be swapped.

The buffers are allocated once, for more encoder rows than the first watch list needs. An encoder
row keeps its column as long as a live version reads it; a new one takes a free column. So a swap
only writes columns that no version reads yet, and compiled or captured graphs stay valid.

An encoder row is identified by its content. If two feature sets name one latent, or a file has only
moved, nothing needs to be written.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch

from saeguard.guard.watchlist import Hook, WatchList, WatchListError

RowId: TypeAlias = bytes
"""Digest of everything that the tap holds for one encoder row."""

SPARE = 32
"""Least number of free columns of a layer, if no capacity is configured."""


class CapacityError(WatchListError):
    """A watch list does not fit the taps: too many encoder rows, another layer or kind of SAE."""


@dataclass(frozen=True, slots=True)
class Columns:
    """The columns of one layer's tap."""

    layer: int
    d_in: int
    first: int
    """Index of its first column among the columns of a forward pass."""
    held: tuple[RowId | None, ...]
    """By column: the encoder row in it; None if it was never written."""
    since: tuple[int, ...]
    """By column: number of the swap that wrote it."""
    normed: bool = False
    """Whether the tap can normalise tokens, which some SAEs need."""
    ranked: frozenset[int] = frozenset()
    """Columns of latents that fire by rank; no other encoder rows may take them."""


def row_tensors(hook: Hook) -> dict[str, torch.Tensor]:
    """Return the hook's tensors that have one entry per encoder row, by name."""
    values = {f.name: getattr(hook, f.name) for f in fields(hook)}
    rows = hook.W.shape[0]
    return {
        name: value
        for name, value in values.items()
        if isinstance(value, torch.Tensor) and value.dim() and value.shape[0] == rows
    }


def at_rows(columns: slice) -> range:
    """Return the indices of the encoder rows in a block of a hook's columns."""
    return range(columns.start, columns.stop)


def row_ids(hook: Hook) -> tuple[RowId, ...]:
    """Return the id of each encoder row of a hook."""
    by_name = {name: t.contiguous().numpy() for name, t in row_tensors(hook).items()}
    by_name.setdefault("norm", np.zeros(hook.W.shape[0], np.int64))
    arrays = [array for _, array in sorted(by_name.items())]
    competitors = {i: part.competitors for part in hook.ranked for i in at_rows(part.columns)}
    ids = []
    for i in range(hook.W.shape[0]):
        digest = hashlib.blake2b(competitors.get(i, "").encode(), digest_size=16)
        for array in arrays:
            digest.update(array[i].tobytes())
        ids.append(digest.digest())
    return tuple(ids)


def allocate(watchlist: WatchList, capacity: int | None) -> tuple[Columns, ...]:
    """Return the columns of a server's first watch list: its encoder rows, then free columns.

    Args:
        watchlist: as compiled.
        capacity: columns of each layer's tap; None for 1.5 times as many as there are encoder
            rows, and at least `SPARE` more.

    Raises:
        CapacityError: the watch list has more encoder rows than `capacity` at one layer.
    """
    columns: list[Columns] = []
    first = 0
    for hook in watchlist.hooks:
        rows = hook.W.shape[0]
        size = max(rows + SPARE, rows * 3 // 2) if capacity is None else capacity
        if rows > size:
            raise CapacityError(_too_many(hook.layer, rows, size))
        held = (*row_ids(hook), *(None for _ in range(size - rows)))
        ranked = frozenset(i for part in hook.ranked for i in at_rows(part.columns))
        normed = hook.norm is not None
        columns.append(Columns(hook.layer, hook.d_in, first, held, (0,) * size, normed, ranked))
        first += size + 1  # the norm follows
    return tuple(columns)


def _too_many(layer: int, rows: int, size: int) -> str:
    return (
        f"the policies watch {rows} rows at layer {layer}, the taps of this server hold {size}: "
        "watch fewer, or set saeguard.watch_capacity and start the server again"
    )


def check_fits(
    columns: Sequence[Columns],
    hooks: Iterable[Hook],
    ids: Sequence[Sequence[RowId]],
    present: Mapping[int, frozenset[int]],
) -> None:
    """Check that the taps can hold a watch list beside the current one, if no other is live.

    The current version is still needed: it judges requests that arrive during the swap.

    Args:
        columns: of the taps.
        hooks: of the watch list; only layer, width, norm and ranked columns matter.
        ids: the encoder rows of each hook.
        present: by layer, the columns that the current version reads.

    Raises:
        CapacityError: names the layer and the numbers.
    """
    by_layer = {c.layer: c for c in columns}
    for hook, rows in zip(hooks, ids, strict=True):
        here = by_layer.get(hook.layer)
        if here is None:
            tapped = ", ".join(map(str, by_layer)) or "none"
            raise CapacityError(
                f"the policies watch layer {hook.layer}, the model of this server is tapped at "
                f"layer {tapped}: a tap is part of the compiled graph; start the server again"
            )
        if hook.d_in != here.d_in:
            raise CapacityError(
                f"the rows at layer {hook.layer} have width {hook.d_in}, the tap there has "
                f"{here.d_in}: they belong to another model"
            )
        if hook.norm is not None and not here.normed:
            raise CapacityError(
                f"the policies watch an SAE at layer {hook.layer} that normalises each token, "
                "which the taps of this server do not compute: start the server again"
            )
        ranked = {rows[i] for part in hook.ranked for i in at_rows(part.columns)}
        if not ranked <= {here.held[i] for i in here.ranked}:
            raise CapacityError(
                f"the policies watch latents at layer {hook.layer} that fire by rank, and the taps "
                "of this server hold other latents' competitors: start the server again"
            )
        wanted, read = set(rows), present.get(hook.layer, frozenset())
        size = len(here.held)
        if len(wanted) > size:
            raise CapacityError(_too_many(hook.layer, len(wanted), size))
        read |= here.ranked
        new = len(wanted - {here.held[i] for i in read})
        if new + len(read) > size:
            raise CapacityError(
                f"the policies watch {len(wanted)} rows at layer {hook.layer}, {new} of them new "
                f"beside the {len(read)} that are in use, the taps of this server hold {size}: "
                "take out policies first and put the others in when that is done, or set "
                "saeguard.watch_capacity and start the server again"
            )


class Assigned(NamedTuple):
    """The columns of a watch list's encoder rows."""

    columns: tuple[Columns, ...]
    at: tuple[np.ndarray, ...]
    """By hook: column of each of its encoder rows, within the layer."""
    missing: tuple[np.ndarray, ...]
    """By hook: indices of its encoder rows that must be written."""


def assign_columns(
    columns: Sequence[Columns],
    hooks: Sequence[Hook],
    ids: Sequence[Sequence[RowId]],
    in_use: Mapping[int, frozenset[int]],
    number: int,
) -> Assigned | None:
    """Return columns for a watch list's encoder rows; None if live versions leave too few free.

    Args:
        columns: of the taps.
        hooks: of the watch list; only layer and ranked columns matter.
        ids: the encoder rows of each hook.
        in_use: by layer, the columns that must not be written.
        number: of the swap.
    """
    by_layer = {c.layer: c for c in columns}
    at, missing = [], []
    for hook, rows in zip(hooks, ids, strict=True):
        here = by_layer[hook.layer]
        held, since = list(here.held), list(here.since)
        where = {row: i for i, row in enumerate(held) if row is not None}
        keep = in_use.get(hook.layer, frozenset()) | {where[r] for r in rows if r in where}
        keep |= here.ranked
        free = iter([i for i in range(len(held)) if i not in keep])
        new = []
        for j, row in enumerate(rows):
            if row in where:
                continue
            column = next(free, None)
            if column is None:
                return None
            held[column], since[column], where[row] = row, number, column
            new.append(j)
        for part in hook.ranked:
            # The swap may lower their screen thresholds. Earlier forward passes then lack
            # activations that this watch list needs, so the columns count as written by this swap.
            for j in at_rows(part.columns):
                since[where[rows[j]]] = number
        by_layer[hook.layer] = replace(here, held=tuple(held), since=tuple(since))
        at.append(np.array([where[row] for row in rows], np.int64))
        missing.append(np.array(new, np.int64))
    return Assigned(tuple(by_layer.values()), tuple(at), tuple(missing))


def over_tap_columns(
    watchlist: WatchList,
    columns: Sequence[Columns],
    at: Sequence[np.ndarray],
    blank: Iterable[Hook] = (),
) -> WatchList:
    """Return the watch list in terms of the taps' columns: every layer, padded to its capacity.

    Padding is zeros, which never fire. No feature reads a column that holds no encoder row of its
    own.

    Args:
        watchlist: as compiled.
        columns: of the taps.
        at: by hook, the column of each encoder row.
        blank: hooks of an earlier version, used for layers that the watch list does not read. Their
            bounds on the norm are not.
    """
    moved = np.zeros(max(watchlist.columns, 1), np.intp)
    by_layer = {hook.layer: (hook, where) for hook, where in zip(watchlist.hooks, at, strict=True)}
    unread = {hook.layer: hook for hook in blank}
    hooks = []
    for here in columns:
        if here.layer not in by_layer:
            hooks.append(replace(unread[here.layer], max_norm=math.inf))
            continue
        hook, where = by_layer[here.layer]
        rows = slice(hook.first_column, hook.first_column + hook.W.shape[0])
        moved[rows] = here.first + where
        padded: dict[str, Any] = {}
        for name, tensor in row_tensors(hook).items():
            padded[name] = tensor.new_zeros(len(here.held), *tensor.shape[1:])
            padded[name][torch.from_numpy(where)] = tensor
        hooks.append(replace(hook, first_column=here.first, **padded))
    clamps = tuple(
        replace(c, columns=tuple(int(by_layer[c.layer][1][j]) for j in c.columns))
        for c in watchlist.clamps
    )
    mix = tuple((moved[column], weight) for column, weight in watchlist.mix)
    return replace(watchlist, hooks=tuple(hooks), mix=mix, clamps=clamps)


def without_weights(watchlist: WatchList) -> WatchList:
    """Return the watch list without the weights, which the rules do not need."""

    def without(hook: Hook) -> Hook:
        bare: dict[str, Any] = {name: t.to("meta") for name, t in row_tensors(hook).items()}
        return replace(hook, **bare)

    return replace(watchlist, hooks=tuple(map(without, watchlist.hooks)))


def used(hooks: Iterable[Hook], at: Iterable[np.ndarray]) -> dict[int, frozenset[int]]:
    """Return the columns that a watch list reads, by layer."""
    return {hook.layer: frozenset(where.tolist()) for hook, where in zip(hooks, at, strict=True)}


def oldest_readable(columns: Iterable[Columns], read: Mapping[int, frozenset[int]]) -> int:
    """Return the number of the swap from which on the taps hold all that a version reads."""
    return max((c.since[i] for c in columns for i in read.get(c.layer, ())), default=0)
