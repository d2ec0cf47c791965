"""The tap: one custom op at the hook point that reads the residual and keeps watched latents.

The op is traced into the model's graph and survives torch.compile and CUDA graphs: it reads and
writes persistent buffers only, never waits for the device, and is found by its layer number.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from saeguard.guard import clamp as clamping
from saeguard.guard.clamp import Clamp
from saeguard.guard.columns import Write
from saeguard.guard.generations import clamps_digest
from saeguard.guard.rows import Rows, allocate_rows
from saeguard.guard.watchlist import WatchList


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
    clamps: dict[str, Clamp]
    """By `generations.clamps_digest`: what edits, for each list that has requests under way. It
    changes between passes; where a CUDA graph was captured, what it held then is what runs."""

    @property
    def clamp(self) -> Clamp | None:
        """Return the oldest clamps, None where nothing can edit."""
        return next(iter(self.clamps.values()), None)


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
        x = hidden.float()
        if residual is not None:
            x = torch.addcmul(x, as_rows(residual).float(), tap.halves)
        pre = torch.addmm(tap.b, x, tap.W)
        # A product rather than a choice, so that NaN stays NaN and is seen.
        torch.mul(pre, pre > tap.theta, out=f)
        for clamp in tap.clamps.values():  # a row belongs to one request, which one of them edits
            clamping.apply(clamp, hidden, f, tap.rows)
    except RuntimeError:  # out of memory among them: serving goes on, the verdict says `error`
        if torch.compiler.is_compiling() or _capturing():
            raise
        tap.f.fill_(torch.nan)  # all of it: which rows are this pass's may be what went wrong
    tap.ticks.add_(1)


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
    for hook in watchlist.hooks:
        TAPS[hook.layer] = Tap(
            layer=hook.layer,
            W=hook.W.to(device).t(),
            b=hook.b.to(device),
            theta=hook.theta.to(device),
            f=torch.zeros(max_tokens, hook.W.shape[0], device=device),
            halves=torch.ones((), device=device),
            ticks=torch.zeros((), dtype=torch.int64, device=device),
            rows=rows,
            clamps={},
        )
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
            )


def write_rows(taps: Iterable[Tap], write: Write) -> None:
    """Put encoder rows into columns that nobody reads yet; buffers stay where they are."""
    for tap in taps:
        if tap.layer == write.layer:
            columns = torch.from_numpy(write.columns).to(tap.W.device)
            for name, rows in write.rows.items():
                held = tap.W.t() if name == "W" else getattr(tap, name)
                held[columns] = torch.from_numpy(rows).to(held.device, held.dtype)


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
