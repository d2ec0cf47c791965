"""The tap: one custom op at the hook point that reads the residual and keeps watched latents.

The op is traced into the model's graph and survives torch.compile and CUDA graphs: it reads and
writes persistent buffers only, never waits for the device, and is found by its layer number.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import structlog
import torch

from saeguard.guard.clamp import rules as clamping
from saeguard.guard.clamp.rules import Clamp
from saeguard.guard.forward_pass import Rows, allocate_rows
from saeguard.guard.topk import Ranked, apply_topk, make_ranked, set_floor
from saeguard.guard.watchlist import WatchList, clamps_digest
from saeguard.sae.encoder import column_scales
from saeguard.sae.rows import EncoderRows

log = structlog.get_logger("saeguard")


class Kernels(NamedTuple):
    """What a GPU runs: functions of `saeguard.guard.kernels.tap` and `fused_rank`."""

    read: Callable[..., None]
    edit: Callable[..., None]
    allocate_buffers: Callable[..., Any]
    apply_topk: Callable[..., None]


class Write(NamedTuple):
    """Rows to put into columns of one layer's tap; arrays, since tensors do not travel."""

    layer: int
    columns: np.ndarray
    """[rows] int64, within the layer."""
    rows: Mapping[str, np.ndarray]
    """By name of a `Hook`'s tensor: [rows, ...]; or `bar`, of columns that fire by rank, which
    lowers what is there."""


@dataclass(frozen=True, slots=True)
class Tap:
    """One layer's watched rows and output buffers, on the model's device."""

    layer: int
    W: torch.Tensor
    """[d_in, watched] float32, a transposed view of contiguous encoder rows."""
    b: torch.Tensor
    theta: torch.Tensor
    floor: torch.Tensor
    """[watched] float32: from where on an activation shows. `theta`, but for columns that fire by
    rank: see `ranked.set_floor`."""
    f: torch.Tensor
    """[max_tokens, watched] float32: activations of the last pass."""
    halves: torch.Tensor
    """[] float32: 1 where a block's second value is still to be added, 0 where it is a left-over
    that the next block ignores. The start-up self-test finds out."""
    ticks: torch.Tensor
    """[] int64: how often the op ran since it was set to 0, which it is before each pass."""
    rows: Rows
    clamps: dict[str, Clamp]
    """By `generations.clamps_digest`: what edits, for each list that has requests under way. It
    changes between passes; where a CUDA graph was captured, what it held then is what runs."""
    norm: torch.Tensor | None = None
    """[watched] int64, which of `NORMS` a column's token is under; None where it is none."""
    ranked: tuple[Ranked, ...] = ()
    """Columns that fire by rank."""
    kernels: Kernels | None = None
    """Where the tap runs on a GPU."""
    scale: torch.Tensor | None = None
    """[max_tokens, watched] float32, room for `column_scales` where it is used."""

    @property
    def clamp(self) -> Clamp | None:
        """Return the oldest clamps, None where nothing can edit."""
        return next(iter(self.clamps.values()), None)


TAPS: dict[int, Tap] = {}
"""The taps of this process's model, by layer. Filled once at start-up."""

FAILURES: Counter[int] = Counter()
"""Passes in which a tap of this process raised, by layer."""

_library: Any = torch.library.Library("saeguard", "DEF")  # type: ignore[no-untyped-call]
_library.define("tap(Tensor(a!) hidden, Tensor? residual, int layer) -> ()")


def as_rows(x: torch.Tensor) -> torch.Tensor:
    """Drop the batch dimension of blocks that are Transformers' own: [1, tokens, d] to [tokens, d].

    Any other third dimension stays, and the product or the self-test refuses it.
    """
    return x.squeeze(0) if x.dim() == 3 else x  # noqa: PLR2004


def _tap(hidden: torch.Tensor, residual: torch.Tensor | None, layer: int) -> None:
    tap = TAPS.get(layer)
    if tap is None:  # a graph that outlived its guard; the start-up self-test reports it
        return
    hidden = as_rows(hidden)
    f = tap.f[: hidden.shape[0]]
    try:
        scale = read(tap, hidden, None if residual is None else as_rows(residual), f)
        for clamp in tap.clamps.values():  # a row belongs to one request, which one of them edits
            clamping.apply(clamp, hidden, f, tap.rows, scale)
    except RuntimeError as error:  # out of memory among them: serving goes on, the verdict says so
        if torch.compiler.is_compiling() or _capturing():
            raise
        tap.f.fill_(torch.nan)  # all of it: which rows are this pass's may be what went wrong
        _tell(tap, error)
    tap.ticks.add_(1)


def _tell(tap: Tap, error: RuntimeError) -> None:
    """Log a failure on the rank where it happened: vLLM hears only one of several.

    The first, and then each time their number has doubled: a fault that stays would fill the log.
    """
    FAILURES[tap.layer] += 1
    failures = FAILURES[tap.layer]
    if failures.bit_count() == 1:
        ranks = torch.distributed
        log.error(
            "saeguard tap failed: its tokens count as not read, and nothing was clamped",
            layer=tap.layer,
            passes=failures,
            rank=ranks.get_rank() if ranks.is_available() and ranks.is_initialized() else 0,
            error=str(error),
        )


def read(
    tap: Tap, hidden: torch.Tensor, residual: torch.Tensor | None, f: torch.Tensor
) -> torch.Tensor | None:
    """Write the activations of a pass to `f`; return `column_scales`.

    Args:
        tap: what is watched.
        hidden: [rows, d_in], any floating dtype.
        residual: the second half, alike; None where a block returns one tensor.
        f: [rows, watched] float32.
    """
    if tap.kernels is not None:
        return _read_fused(tap, tap.kernels, hidden, residual, f)
    x = hidden.float()
    if residual is not None:
        x = torch.addcmul(x, residual.float(), tap.halves)
    scale = column_scales(tap.norm, x)
    pre_activations(tap, x, scale, out=f)
    # A product rather than a choice, so that NaN stays NaN and is seen.
    f.mul_(f > tap.floor)
    for ranked in tap.ranked:
        apply_topk(ranked, x, f)
    return scale


def _read_fused(
    tap: Tap,
    kernels: Kernels,
    hidden: torch.Tensor,
    residual: torch.Tensor | None,
    f: torch.Tensor,
) -> torch.Tensor | None:
    """Do the same in one launch, and a few more where latents fire by rank."""
    scale = None if tap.scale is None else tap.scale[: len(f)]
    W = tap.W.t()
    kernels.read(hidden, residual, tap.halves, W, tap.b, tap.theta, f, tap.norm, scale)
    for ranked in tap.ranked:
        kernels.apply_topk(ranked, hidden, residual, tap.halves, f, scale)
    return scale


def kernels_for(device: torch.device) -> Kernels | None:
    """Return the Triton kernels where they can run."""
    if device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return None
    fused = importlib.import_module("saeguard.guard.kernels.tap")
    rank = importlib.import_module("saeguard.guard.kernels.topk")
    return Kernels(fused.read, fused.edit, rank.allocate_buffers, rank.apply_topk)


def pre_activations(
    tap: Tap, x: torch.Tensor, scale: torch.Tensor | None, *, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Return [rows, watched] float32 for `x` [rows, d_in] float32 and its `column_scales`."""
    if scale is None:
        return torch.addmm(tap.b, x, tap.W, out=out)
    return torch.mm(x, tap.W, out=out).mul_(scale).add_(tap.b)


def _capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _fake(hidden: torch.Tensor, residual: torch.Tensor | None, layer: int) -> None:
    """Tell the tracer that there is nothing to return."""


_library.impl("tap", _tap, "CompositeExplicitAutograd")
torch.library.register_fake("saeguard::tap", _fake, lib=_library)


def fingerprint() -> str:
    """Return a digest of what is traced into a graph: the op's schema, and how it is called."""
    schema = str(torch.ops.saeguard.tap.default._schema)  # noqa: SLF001 - has no other name
    return hashlib.sha256(schema.encode() + Path(__file__).read_bytes()).hexdigest()[:16]


def install_taps(
    watchlist: WatchList, *, max_tokens: int, slots: int, device: torch.device
) -> tuple[Tap, ...]:
    """Move the watch list to `device` and register one tap a layer.

    Args:
        watchlist: the compiled policies.
        max_tokens: rows of the largest pass, padding included.
        slots: requests that can be in flight at once; slot 0 is added for padding rows.
        device: where the model runs.
    """
    TAPS.clear()
    rows = allocate_rows(max_tokens, device)
    kernels = kernels_for(device)
    buffers = None if kernels is None else partial(kernels.allocate_buffers, max_tokens=max_tokens)
    for hook in watchlist.hooks:
        encoder_rows = EncoderRows(hook.W, hook.b, hook.theta).to(device)
        W, b, theta = encoder_rows.W, encoder_rows.b, encoder_rows.theta
        TAPS[hook.layer] = tap = Tap(
            layer=hook.layer,
            W=W.t(),
            b=b,
            theta=theta,
            floor=theta.clone(),
            f=torch.zeros(max_tokens, len(b), device=device),
            halves=torch.ones((), device=device),
            ticks=torch.zeros((), dtype=torch.int64, device=device),
            rows=rows,
            clamps={},
            norm=None if hook.norm is None else hook.norm.to(device),
            kernels=kernels,
            scale=None
            if hook.norm is None or kernels is None
            else torch.zeros(max_tokens, len(b), device=device),
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


def add_clamps(taps: Iterable[Tap], digest: str, watchlist: WatchList, *, slots: int) -> None:
    """Let a list's clamps edit at the taps of its layers, for the requests admitted to them."""
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
    """Write from where on activations show."""
    tap.floor.copy_(tap.theta)
    for ranked in tap.ranked:
        set_floor(ranked, tap.floor)


def write_rows(taps: Iterable[Tap], write: Write) -> None:
    """Put encoder rows into columns that nobody reads yet; buffers stay where they are."""
    for tap in taps:
        if tap.layer == write.layer:
            columns = torch.from_numpy(write.columns).to(tap.W.device)
            if tap.norm is not None and "W" in write.rows:
                tap.norm[columns] = 0  # unless the rows say otherwise
            for name, rows in write.rows.items():
                values = torch.from_numpy(rows).to(tap.W.device)
                if name == "screen":
                    _lower_screen(tap, columns, values)
                    continue
                held = tap.W.t() if name == "W" else getattr(tap, name)
                held[columns] = values.to(held.dtype)
            set_floors(tap)


def _lower_screen(tap: Tap, columns: torch.Tensor, screen_thresholds: torch.Tensor) -> None:
    """Let latents show from a lower activation on; lists still in use need the bars they had."""
    for ranked in tap.ranked:
        mine = (columns >= ranked.columns.start) & (columns < ranked.columns.stop)
        at = columns[mine] - ranked.columns.start
        ranked.screen[at] = torch.minimum(ranked.screen[at], screen_thresholds[mine])


def tap_output(
    output: torch.Tensor | tuple[torch.Tensor, ...], layer: int
) -> torch.Tensor | tuple[torch.Tensor, ...]:
    """Run the tap on a decoder layer's output: one tensor, or `(hidden, residual, ...)`."""
    if isinstance(output, torch.Tensor):
        torch.ops.saeguard.tap(output, None, layer)
    else:
        residual = output[1] if len(output) > 1 and isinstance(output[1], torch.Tensor) else None
        torch.ops.saeguard.tap(output[0], residual, layer)
    return output
