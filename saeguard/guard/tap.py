"""The tap: one custom op at the hook point that reads the residual and keeps watched latents.

The op is traced into the model's graph and survives torch.compile and CUDA graphs: it reads and
writes persistent buffers only, never waits for the device, and is found by its layer number.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from saeguard.guard import clamp as clamping
from saeguard.guard.clamp import Clamp
from saeguard.guard.ranked import Ranked, make_ranked, settle
from saeguard.guard.rows import Rows, allocate_rows
from saeguard.guard.watchlist import WatchList
from saeguard.sae.encoder import column_scales


@dataclass(frozen=True, slots=True)
class Tap:
    """One layer's watched rows and output buffers, on the model's device."""

    layer: int
    W: torch.Tensor
    """[d_in, watched] float32, a transposed view of contiguous encoder rows."""
    b: torch.Tensor
    theta: torch.Tensor
    f: torch.Tensor
    """[max_tokens, watched] float32: activations of the last pass."""
    halves: torch.Tensor
    """[] float32: 1 where a block's second value is still to be added, 0 where it is a left-over
    that the next block ignores. The start-up self-test finds out."""
    ticks: torch.Tensor
    """[] int64: how often the op ran since it was set to 0, which it is before each pass."""
    rows: Rows
    clamp: Clamp | None
    norm: torch.Tensor | None = None
    """[watched] int64, which of `NORMS` a column's token is under; None where it is none."""
    ranked: tuple[Ranked, ...] = ()
    """Columns that fire by rank."""
    fused: Callable[..., None] | None = None
    """`saeguard.guard.fused.read`, where the tap runs on a GPU."""
    scale: torch.Tensor | None = None
    """[max_tokens, watched] float32, room for `column_scales` where it is used."""


TAPS: dict[int, Tap] = {}
"""The taps of this process's model, by layer. Filled once at start-up."""

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
        read = _read_plainly if tap.fused is None else _read_fused
        scale = read(tap, hidden, None if residual is None else as_rows(residual), f)
        if tap.clamp is not None:
            clamping.apply(tap.clamp, hidden, f, tap.rows, scale)
    except RuntimeError:  # out of memory among them: serving goes on, the verdict says `error`
        if torch.compiler.is_compiling() or _capturing():
            raise
        tap.f.fill_(torch.nan)  # all of it: which rows are this pass's may be what went wrong
    tap.ticks.add_(1)


def _read_plainly(
    tap: Tap, hidden: torch.Tensor, residual: torch.Tensor | None, f: torch.Tensor
) -> torch.Tensor | None:
    """Write the activations of a pass to `f`; return `column_scales`."""
    x = hidden.float()
    if residual is not None:
        x = torch.addcmul(x, residual.float(), tap.halves)
    scale = column_scales(tap.norm, x)
    pre = pre_activations(tap, x, scale)
    # A product rather than a choice, so that NaN stays NaN and is seen.
    torch.mul(pre, pre > tap.theta, out=f)
    for ranked in tap.ranked:
        settle(ranked, x, f)
    return scale


def _read_fused(
    tap: Tap, hidden: torch.Tensor, residual: torch.Tensor | None, f: torch.Tensor
) -> torch.Tensor | None:
    """Do the same in one launch."""
    assert tap.fused is not None
    scale = None if tap.scale is None else tap.scale[: len(f)]
    tap.fused(hidden, residual, tap.halves, tap.W.t(), tap.b, tap.theta, f, tap.norm, scale)
    return scale


def _kernels(device: torch.device) -> Any:
    """Return the module of Triton kernels where it can run."""
    if device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return None
    return importlib.import_module("saeguard.guard.fused")


def pre_activations(tap: Tap, x: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    """Return [rows, watched] float32 for `x` [rows, d_in] float32 and its `column_scales`."""
    if scale is None:
        return torch.addmm(tap.b, x, tap.W)
    return torch.addcmul(tap.b, torch.mm(x, tap.W), scale)


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
    kernels = _kernels(device)
    for hook in watchlist.hooks:
        clamp_rows = next((c for c in watchlist.clamps if c.layer == hook.layer), None)
        TAPS[hook.layer] = Tap(
            layer=hook.layer,
            W=hook.W.to(device).t(),
            b=hook.b.to(device),
            theta=hook.theta.to(device),
            f=torch.zeros(max_tokens, hook.W.shape[0], device=device),
            halves=torch.ones((), device=device),
            ticks=torch.zeros((), dtype=torch.int64, device=device),
            rows=rows,
            norm=None if hook.norm is None else hook.norm.to(device),
            fused=None if kernels is None else kernels.read,
            scale=None
            if hook.norm is None or kernels is None
            else torch.zeros(max_tokens, hook.W.shape[0], device=device),
            ranked=tuple(make_ranked(rows, device) for rows in hook.ranked),
            clamp=None
            if clamp_rows is None
            else clamping.make_clamp(
                watchlist,
                clamp_rows,
                hook,
                slots=slots + 1,
                max_tokens=max_tokens,
                device=device,
                launch=None if kernels is None else kernels.edit,
            ),
        )
    return tuple(TAPS.values())


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
