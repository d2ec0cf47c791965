"""The tap: one custom op at the hook point that reads the residual stream for the watched latents.

The op is traced into the model's graph and survives torch.compile and CUDA graphs: it reads and
writes persistent buffers only, never waits for the device, and finds its tap by the layer number.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import structlog
import torch

from saeguard.guard.clamp import rules as clamping
from saeguard.guard.clamp.state import Clamp
from saeguard.guard.forward_pass import Rows
from saeguard.guard.host_arrays import array_of
from saeguard.guard.host_loop import HostLoop
from saeguard.guard.topk import Ranked, apply_topk
from saeguard.sae.encoder import column_scales

log = structlog.get_logger("saeguard")


class Kernels(NamedTuple):
    """The Triton launches of a tap on a GPU, from `saeguard.guard.kernels`."""

    read: Callable[..., None]
    edit: Callable[..., None]
    apply_topk: Callable[..., None]


@dataclass(frozen=True, slots=True)
class Tap:
    """One layer's encoder rows and output buffers, on the model's device."""

    layer: int
    W: torch.Tensor
    """[d_in, watched] float32, a transposed view of contiguous encoder rows."""
    b: torch.Tensor
    theta: torch.Tensor
    floor: torch.Tensor
    """[watched] float32: the activation from which the tap reports a latent. It equals `theta`,
    except for latents that fire by rank: see `topk.set_floor`."""
    f: torch.Tensor
    """[max_tokens, watched + 1] float32: activations of the last forward pass, and in the last
    column the norm of the residual, by which the rules leave out attention sinks."""
    halves: torch.Tensor
    """[] float32: 1 if the two values that a decoder layer returns add up to the residual stream,
    0 if the next layer ignores the second. The start-up self-test measures which."""
    ticks: torch.Tensor
    """[] int64: number of runs of the op since the pass began."""
    rows: Rows
    clamps: dict[str, Clamp]
    """By `clamps_digest`: the clamps of each watch list with requests in flight. It changes between
    passes; a captured CUDA graph replays the clamps that it was captured with."""
    norm: torch.Tensor | None = None
    """[watched] int64, indices into `NORMS`; None if no column's token is normalised."""
    ranked: tuple[Ranked, ...] = ()
    """The blocks of columns whose latents fire by rank."""
    kernels: Kernels | None = None
    """The launches on a GPU; None elsewhere."""
    loop: HostLoop | None = None
    """The op as one compiled loop, for few rows on a CPU; None elsewhere."""
    scale: torch.Tensor | None = None
    """[max_tokens, watched + 1] float32, the buffer of `column_scales` if it is needed on a GPU;
    its rows lie as far apart as those of `f`, and its last column is not used."""


TAPS: dict[int, Tap] = {}
"""The taps of this process's model, by layer; `install_taps` fills it once at start-up."""

FAILURES: Counter[int] = Counter()
"""Forward passes in which a tap of this process raised, by layer."""

TRACE_VERSION = 1
"""Version of what is traced into a graph: the op's schema, its fake, and how `tap_output` calls it.
Raise it if one of them changes; `tests/guard/test_trace_version.py` fails otherwise."""

_library: Any = torch.library.Library("saeguard", "DEF")  # type: ignore[no-untyped-call]
_library.define("tap(Tensor(a!) hidden, Tensor? residual, int layer) -> ()")


def fingerprint() -> str:
    """Return a digest of what is traced into a graph, for vLLM's compile cache."""
    schema = str(torch.ops.saeguard.tap.default._schema)  # noqa: SLF001 - has no other name
    return hashlib.sha256(f"{TRACE_VERSION} {schema}".encode()).hexdigest()[:16]


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


def tap_hook(layer: int) -> Callable[[Any, Any, Any], Any]:
    """Return a forward hook that taps a decoder layer; torch.compile traces it into the graph."""

    def saeguard_tap(_module: Any, _args: Any, output: Any) -> Any:
        return tap_output(output, layer)

    return saeguard_tap


def as_rows(x: torch.Tensor) -> torch.Tensor:
    """Return [tokens, d_in] for [1, tokens, d_in], the shape in Transformers' own layers.

    A tensor with any other third dimension stays as it is, and the product or the self-test
    refuses it.
    """
    return x.squeeze(0) if x.dim() == 3 else x  # noqa: PLR2004


def _tap(hidden: torch.Tensor, residual: torch.Tensor | None, layer: int) -> None:
    tap = TAPS.get(layer)
    if tap is None:  # a graph that outlived its guard; the start-up self-test reports it
        return
    hidden = as_rows(hidden)
    residual = None if residual is None else as_rows(residual)
    scale, n = None, len(hidden)
    try:
        if tap.loop is None or not tap.loop.read(hidden, residual):
            scale = read(tap, hidden, residual, tap.f[:n])
        for clamp in tap.clamps.values():  # a row belongs to one request, and one clamp edits it
            f: Any = tap.f if clamp.on_host is None else array_of(tap.f)
            clamping.apply(clamp, hidden, f[:n], tap.rows, scale)
    except RuntimeError as error:  # such as out of memory: serving goes on, verdicts are `error`
        if torch.compiler.is_compiling() or _capturing():
            raise
        tap.f.fill_(torch.nan)  # all of it, since the number of rows may be wrong
        _log_failure(tap, error)
    if tap.ticks.is_cpu:
        array_of(tap.ticks)[()] += 1
    else:
        tap.ticks.add_(1)


def _fake(hidden: torch.Tensor, residual: torch.Tensor | None, layer: int) -> None:
    """Return nothing while tracing, as the op does."""


_library.impl("tap", _tap, "CompositeExplicitAutograd")
torch.library.register_fake("saeguard::tap", _fake, lib=_library)


def _capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _log_failure(tap: Tap, error: RuntimeError) -> None:
    """Log a failure on the rank where it happened, since vLLM reads the output of one rank only.

    Log the first failure, and then each time their number has doubled, so that a lasting fault does
    not fill the log.
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
    """Write the activations and norms of a forward pass to `f`; return `column_scales`.

    Args:
        tap: the layer's tap.
        hidden: [rows, d_in], any floating dtype.
        residual: the second value of the decoder layer, of the same shape; None without one.
        f: [rows, watched + 1] float32.
    """
    if tap.kernels is not None:
        return _read_by_kernels(tap, tap.kernels, hidden, residual, f)
    x = hidden.float()
    if residual is not None:
        x = torch.addcmul(x, residual.float(), tap.halves)
    scale = column_scales(tap.norm, x)
    fired = pre_activations(tap, x, scale, out=f[:, :-1])
    torch.linalg.vector_norm(x, dim=1, out=f[:, -1])
    # A product rather than a choice, so that NaN stays NaN and counts as an error.
    fired.mul_(fired > tap.floor)
    for ranked in tap.ranked:
        apply_topk(ranked, x, fired)
    return scale


def _read_by_kernels(
    tap: Tap,
    kernels: Kernels,
    hidden: torch.Tensor,
    residual: torch.Tensor | None,
    f: torch.Tensor,
) -> torch.Tensor | None:
    """Do the same as `read` in one launch, and in six more per block that fires by rank."""
    scale = None if tap.scale is None else tap.scale[: len(f)]
    W = tap.W.t()
    kernels.read(hidden, residual, tap.halves, W, tap.b, tap.theta, f, tap.norm, scale)
    for ranked in tap.ranked:
        kernels.apply_topk(ranked, hidden, residual, tap.halves, f, scale)
    return scale


def pre_activations(
    tap: Tap, x: torch.Tensor, scale: torch.Tensor | None, *, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Return [rows, watched] float32 for `x` [rows, d_in] float32 and its `column_scales`."""
    if scale is None:
        return torch.addmm(tap.b, x, tap.W, out=out)
    return torch.mm(x, tap.W, out=out).mul_(scale).add_(tap.b)
