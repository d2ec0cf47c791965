"""Measure memory and time of the taps, for the log line "saeguard ready"."""

from __future__ import annotations

import time
from dataclasses import fields
from typing import Any

import torch

from saeguard.vllm.worker.guard import WorkerGuard


def measure_cost(guard: WorkerGuard, rows: int, repeats: int = 20) -> tuple[float, float]:
    """Return the MiB that the taps hold, and their microseconds in a pass of `rows` rows."""
    tensors: set[torch.Tensor] = {guard.eligible_ids}
    for tap in guard.taps:
        clamps = tap.clamps.values()
        parts: list[Any] = [tap, tap.rows, *clamps, *(clamp.edits for clamp in clamps)]
        parts += [ranked.buffers for ranked in tap.ranked if ranked.buffers is not None]
        for part in parts:
            values = [getattr(part, f.name) for f in fields(part)]
            tensors |= {v for v in values if isinstance(v, torch.Tensor)}
        tensors |= {t for r in tap.ranked for t in (r.competitors.rows.W, r.competitors.rows.b)}
    held = sum(t.untyped_storage().nbytes() for t in tensors) / 2**20
    guard.rows.clamp_slot.zero_()  # no request's slot, so nothing is clamped
    samples = []
    for _ in range(repeats):
        started = time.perf_counter()
        for tap in guard.taps:
            torch.ops.saeguard.tap(tap.W.new_zeros(rows, tap.W.shape[0]), None, tap.layer)
        if guard.device.type == "cuda":
            torch.cuda.synchronize(guard.device)
        samples.append(time.perf_counter() - started)
    return held, 1e6 * sorted(samples)[repeats // 2]
