"""Capture, replay and time work on a GPU; in Triton's interpreter, plain calls and a host clock.

A captured graph is replayed by one call of the host's, so that its time is the device's alone.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any
from unittest import mock

import torch

from benchmarks.gpu_record import Record

FLUSH_BYTES = 256 << 20
"""Written before a call that is to find its inputs in memory: several times an H200's L2."""
HEAD_START = 8
"""Such writes before replays in a row: half a millisecond in which the host gets ahead."""
WARM_UPS, LAUNCHES = 2, 5
SAMPLES = 30
"""Of a time, at most; 3 at least."""
BUDGET_S = 0.15
"""Of samples of one time, where that leaves enough."""
LONG_US = 5e4
"""What takes longer is timed once."""

Call = Callable[[], Any]


def on_gpu() -> bool:
    """Return whether there is a GPU."""
    return torch.cuda.is_available()


def device() -> torch.device:
    """Return the GPU, or the CPU for Triton's interpreter."""
    return torch.device("cuda" if on_gpu() else "cpu")


@contextmanager
def kernels_everywhere() -> Iterator[None]:
    """Let taps on a CPU have the kernels too, which Triton's interpreter runs."""
    from saeguard.guard import install_taps  # noqa: PLC0415 - imports Triton, after its mode is chosen

    kernels = install_taps.kernels_for(torch.device("cuda"))
    assert kernels is not None, "Triton is not installed"
    with mock.patch.object(install_taps, "kernels_for", return_value=kernels):
        yield


def captured(call: Call) -> Call:
    """Return what replays `call` as a CUDA graph; `call` itself where there is no GPU.

    `call` runs a few times first, on a stream of its own: kernels are compiled and libraries
    initialised before the capture, in which neither is allowed.
    """
    if not on_gpu():
        return call
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UPS):
            call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def times(call: Call, replay: Call | None = None) -> Record:
    """Return microseconds of a call.

    `cold_us` is a replay after the L2 was flushed; `warm_us` one of many in a row; `launch_us` what
    the host needs to launch the call without a graph.

    Args:
        call: the work.
        replay: `captured(call)`, if it is there already.
    """
    if not on_gpu():
        began = time.perf_counter()
        call()
        return {"host_us": _micro(time.perf_counter() - began), "captured": False}
    replay = captured(call) if replay is None else replay
    once = _cold(replay, 1)
    if once > LONG_US:
        return {"cold_us": round(once, 2), "samples": 1}
    samples = int(min(max(3, BUDGET_S * 1e6 / max(once, 1.0)), SAMPLES))
    found = {"cold_us": round(_cold(replay, samples), 2)}
    found["warm_us"] = round(_warm(replay, samples), 2)
    return {**found, "launch_us": _launch(call), "samples": samples}


def ceilings(moved: int, product: Call | None = None) -> Record:
    """Return microseconds of what the device can do at best, by the same clock.

    Args:
        moved: bytes that the call must read and write, at least.
        product: the bare matrix product of the same sizes and dtype.
    """
    found = {"copy_us": _first(times(_copy(moved))), "moved_mb": round(moved / 1e6, 3)}
    if product is not None:
        found["product_us"] = _first(times(product))
    return found


def compared(found: Record, ceiling: Record) -> Record:
    """Return both, and by what factor a call takes longer than the higher of its ceilings."""
    highest = max(v for k, v in ceiling.items() if k in {"copy_us", "product_us"})
    return {**found, **ceiling, "of_ceiling": round(_first(found) / max(highest, 1e-3), 3)}


def _first(found: Record) -> float:
    return float(found.get("cold_us", found.get("host_us", 0.0)))


def _copy(moved: int) -> Call:
    """Return a copy on the device that reads and writes so many bytes together."""
    source = torch.empty(max(1, moved // 2), dtype=torch.uint8, device=device()).random_()
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


@cache
def _flushing() -> torch.Tensor:
    return torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device())


def _cold(replay: Call, samples: int) -> float:
    """Return the median time of replays that find the L2 full of something else.

    The flush takes longer than the host needs for what follows it, so the device never waits.
    """
    pairs = []
    for _ in range(samples):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        _flushing().zero_()
        begin.record()
        replay()
        end.record()
        pairs.append((begin, end))
    torch.cuda.synchronize()
    return 1e3 * statistics.median(begin.elapsed_time(end) for begin, end in pairs)


def _warm(replay: Call, samples: int) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for _ in range(HEAD_START):
        _flushing().zero_()
    replay()
    begin.record()
    for _ in range(samples):
        replay()
    end.record()
    torch.cuda.synchronize()
    return 1e3 * begin.elapsed_time(end) / samples


def _launch(call: Call) -> float:
    """Return the median of a few launches: a full queue would make the host wait for the device."""
    took = []
    for _ in range(LAUNCHES):
        torch.cuda.synchronize()
        began = time.perf_counter()
        call()
        took.append(time.perf_counter() - began)
    torch.cuda.synchronize()
    return _micro(statistics.median(took))


def _micro(seconds: float) -> float:
    return round(1e6 * seconds, 2)
