"""Which column of the tap holds which encoder row, so that a list can change while it is in use.

Buffers are allocated once, for more rows than the first list needs. A row keeps its column as long
as any list in use reads it; a new row takes a free one. So a list is swapped by writing columns
that nobody reads yet, and graphs that were compiled or captured stay valid.

A row is known by its content: where two feature sets name one latent, or a file has only moved,
there is nothing to write.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch

from saeguard.guard.install_taps import Write
from saeguard.guard.watchlist import Hook, WatchList, WatchListError

RowId: TypeAlias = bytes
"""Digest of everything that the tap holds of one row."""

SPARE = 32
"""Free columns a layer, at least, where the operator does not say how many."""


class CapacityError(WatchListError):
    """A list needs more rows than the taps were allocated for, or another layer."""


def merge_writes(earlier: Sequence[Write], later: Sequence[Write]) -> tuple[Write, ...]:
    """Return writes that leave the taps as both would, one after the other; no column twice."""
    lowered = [w for w in (*earlier, *later) if "screen" in w.rows]
    over = [w for w in later if "screen" not in w.rows]
    writes = [
        Write(layer, *_lowest([w for w in lowered if w.layer == layer]))
        for layer in sorted({w.layer for w in lowered})
    ]
    for write in earlier:
        if "screen" in write.rows:
            continue
        again = [w.columns for w in over if w.layer == write.layer]
        left = ~np.isin(write.columns, np.concatenate([*again, write.columns[:0]]))
        if left.any():
            rows = {name: values[left] for name, values in write.rows.items()}
            writes.append(Write(write.layer, write.columns[left], rows))
    return (*writes, *over)


def _lowest(writes: Sequence[Write]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Return columns of one layer and the lowest bar that is written to each."""
    screen_thresholds = np.concatenate([w.rows["screen"] for w in writes])
    columns, which = np.unique(np.concatenate([w.columns for w in writes]), return_inverse=True)
    lowest = np.full(len(columns), np.inf, screen_thresholds.dtype)
    np.minimum.at(lowest, which, screen_thresholds)
    return columns, {"screen": lowest}


@dataclass(frozen=True, slots=True)
class Columns:
    """The columns of one layer's tap."""

    layer: int
    d_in: int
    first: int
    """Where they start among all columns of a packet."""
    held: tuple[RowId | None, ...]
    """By column: the row in it, None where nothing was ever written."""
    since: tuple[int, ...]
    """By column: number of the swap that wrote it."""
    normed: bool = False
    """Whether the tap can normalise tokens, as some SAEs do."""
    ranked: frozenset[int] = frozenset()
    """Columns of latents that fire by rank, whose rivals the tap holds; others cannot go there."""


def row_tensors(hook: Hook) -> dict[str, torch.Tensor]:
    """Return the hook's tensors of one entry a row, by name."""
    values = {f.name: getattr(hook, f.name) for f in fields(hook)}
    rows = hook.W.shape[0]
    return {
        name: value
        for name, value in values.items()
        if isinstance(value, torch.Tensor) and value.dim() and value.shape[0] == rows
    }


def at_rows(columns: slice) -> range:
    """Return the rows of a block of columns."""
    return range(columns.start, columns.stop)


def row_ids(hook: Hook) -> tuple[RowId, ...]:
    """Return the id of each row of a hook."""
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
    """Return the columns of a server's first list: its rows in order, then free ones.

    Args:
        watchlist: as compiled.
        capacity: rows of each layer's tap; None for half as many again as the list needs.

    Raises:
        CapacityError: the list itself needs more.
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
        first += size
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
    """Check that a list could be served beside the present one, were no other in use.

    Beside it, because requests that come while rows are written still belong to the present one.

    Args:
        columns: as they are.
        hooks: of the list; only layer and width are looked at.
        ids: the rows of each.
        present: by layer, the columns that the present list reads.

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
                f"the policies watch latents at layer {hook.layer} that fire by rank, and their "
                "rivals are not what the taps of this server hold: start the server again"
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
    """A list whose rows have columns."""

    columns: tuple[Columns, ...]
    at: tuple[np.ndarray, ...]
    """By hook of the list: column of each of its rows, within the layer."""
    missing: tuple[np.ndarray, ...]
    """By hook of the list: which of its rows must be written."""


def assign_columns(
    columns: Sequence[Columns],
    hooks: Sequence[Hook],
    ids: Sequence[Sequence[RowId]],
    in_use: Mapping[int, frozenset[int]],
    number: int,
) -> Assigned | None:
    """Find columns for a list's rows; None where lists still in use leave too few.

    Args:
        columns: as they are.
        hooks: of the list; only their layer and what fires by rank is looked at.
        ids: the rows of each.
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
            # Their bars may lie lower now: earlier passes show less than this list must see.
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
    """Return the list over the taps' own columns: every layer, padded to its capacity.

    What the taps hold in columns that the list does not read reaches no feature of it. Padding is
    zeros, which never fire.

    Args:
        watchlist: as compiled.
        columns: of the taps.
        at: by hook, the column of each row.
        blank: what stands for layers that the list does not read: hooks of a list before.
    """
    moved = np.zeros(max(watchlist.columns, 1), np.intp)
    by_layer = {hook.layer: (hook, where) for hook, where in zip(watchlist.hooks, at, strict=True)}
    unread = {hook.layer: hook for hook in blank}
    hooks = []
    for here in columns:
        if here.layer not in by_layer:
            hooks.append(unread[here.layer])
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
    """Return the list without the weights, which the rules do not need."""

    def without(hook: Hook) -> Hook:
        bare: dict[str, Any] = {name: t.to("meta") for name, t in row_tensors(hook).items()}
        return replace(hook, **bare)

    return replace(watchlist, hooks=tuple(map(without, watchlist.hooks)))


def used(hooks: Iterable[Hook], at: Iterable[np.ndarray]) -> dict[int, frozenset[int]]:
    """Return the columns that a list reads, by layer."""
    return {hook.layer: frozenset(where.tolist()) for hook, where in zip(hooks, at, strict=True)}


def oldest_readable(columns: Iterable[Columns], read: Mapping[int, frozenset[int]]) -> int:
    """Return the swap from which on passes hold all that a list reads."""
    return max((c.since[i] for c in columns for i in read.get(c.layer, ())), default=0)
