"""The whole tap op with its clamps on the device: with the kernels, and in plain torch beside it.

Two taps of one watch list stand side by side, one as a GPU has it and one without kernels. They
are given the same passes of the same requests, in chunks, with padding behind them. Numbers lie on
a grid of eighths, so activations, decisions and edits must be equal bit for bit.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any
from unittest import mock

import numpy as np
import torch

from benchmarks.gpu_record import Case, Record
from benchmarks.gpu_tap import on_grid
from benchmarks.gpu_timing import captured, ceilings, compared, device, times
from saeguard.guard import install_taps as installing
from saeguard.guard.clamp import state as clamping
from saeguard.guard.forward_pass import lay_out
from saeguard.guard.install_taps import install_taps
from saeguard.guard.scopes import OUTPUT
from saeguard.guard.tap import TAPS, Tap
from saeguard.guard.watchlist import ClampRows, Hook, WatchList
from saeguard.policy.types import Clamp, Name, Selection, Window
from tests.guard.watchlists import FEATURES, make_policy, make_watchlist, random_policy

REQUESTS = 3
PASSES = 12
PLAIN, FUSED = 0, 1
"""Layers under which the two taps are found."""


def make_list(seed: int, d_in: int, watched: int, *, clamps: bool) -> WatchList:
    """Return random policies over the first latents, which read one entry of the residual each."""
    rng = random.Random(seed)
    W = on_grid(watched, d_in).cpu()
    W[:FEATURES] = torch.eye(FEATURES, d_in)
    theta = torch.full((watched,), 0.5)
    theta[:FEATURES:2] = -torch.inf
    hook = Hook(0, d_in, W, torch.zeros(watched), theta, 0)
    edits = [Clamp((f"f{i}",), 0.0) if clamps else None for i in range(3)]
    # One that surely matches, and two over random conditions, windows and scopes.
    policies = [
        make_policy(
            "p0", Name("a"), {"a": Selection("f0", 0.5)}, window=Window(2, 4), clamp=edits[0]
        ),
        *(random_policy(rng, f"p{i}", longest=6, clamp=edits[i]) for i in (1, 2)),
    ]
    own = tuple(range(len(policies)))
    target, W_dec = torch.tensor([0.5 * i for i in own]), on_grid(len(own), d_in).cpu()
    clamped = [ClampRows(0, own, own, own, target, W_dec)] if clamps else []
    return make_watchlist(policies, [hook], clamped)


def install(watchlist: WatchList, rows: int) -> tuple[Tap, Tap]:
    """Install the list twice: in plain torch, and with kernels."""
    make = partial(install_taps, watchlist, max_tokens=rows, slots=REQUESTS, device=device())
    with mock.patch.object(installing, "kernels_for", return_value=None):
        (plain,) = make()
    (fused,) = make()
    assert plain.kernels is None
    assert fused.kernels is not None
    TAPS.clear()
    TAPS.update({PLAIN: plain, FUSED: replace(fused, layer=FUSED)})
    return plain, fused


def passes(seed: int, rows: int) -> Iterator[tuple[np.ndarray, list[int], torch.Tensor]]:
    """Yield passes: where requests begin, their first positions, and tokens that are excluded."""
    rng = random.Random(seed)
    done = [0] * REQUESTS
    for _ in range(PASSES):
        counts = [rng.randint(1, rows // REQUESTS) for _ in done]
        excluded = torch.rand(rows) < 0.1
        yield np.cumsum([0, *counts]), list(done), excluded
        done = [d + n for d, n in zip(done, counts, strict=True)]


def lay(tap: Tap, query_start: np.ndarray, first: list[int], excluded: torch.Tensor) -> None:
    """Write the layout of a pass, as the worker does."""
    counts = np.diff(query_start)
    position = np.concatenate([np.arange(s, s + n) for s, n in zip(first, counts, strict=True)])
    slots = range(1, 1 + REQUESTS)
    on = tap.f.device
    outputs = np.full(len(position), OUTPUT)
    lay_out(tap.rows, slots, query_start, torch.from_numpy(position).to(on), outputs)
    tap.rows.eligible.copy_(~excluded.to(on))
    tap.ticks.zero_()


def check(seed: int, rows: int, d_in: int, watched: int, *, clamps: bool, replayed: bool) -> Record:
    """Compare the two taps pass by pass."""
    plain, fused = install(make_list(seed, d_in, watched, clamps=clamps), rows)
    hidden = torch.zeros(rows, d_in, dtype=torch.bfloat16, device=device())
    residual = torch.zeros_like(hidden)
    call: Any = partial(torch.ops.saeguard.tap, hidden, residual, FUSED)
    if replayed:
        call = captured(call)  # all rows in the slot of nobody, as where vLLM captures
    enforced = [True, True, False]
    for tap in (plain, fused):
        for clamp in tap.clamps.values():
            for slot in range(1, 1 + REQUESTS):
                clamping.admit(clamp, slot, enforced)
    acted = 0
    for step in passes(seed, rows):
        for tap in (plain, fused):
            lay(tap, *step)
        hidden.copy_(on_grid(rows, d_in))
        residual.copy_(on_grid(rows, d_in))
        expected = hidden.clone()
        torch.ops.saeguard.tap(expected, residual, PLAIN)
        fused.f.fill_(7e7)
        call()
        assert torch.equal(fused.f[:, :-1], plain.f[:, :-1]), "activations differ"
        assert torch.allclose(fused.f[:, -1], plain.f[:, -1], rtol=1e-5), "norms differ"
        assert torch.equal(hidden, expected), "edits differ"
        assert int(fused.ticks) == int(plain.ticks) == 1, "the op did not run once"
        for one, other in zip(plain.clamps.values(), fused.clamps.values(), strict=True):
            assert torch.equal(one.acted, other.acted), "decisions differ"
            acted += int(one.acted.sum())
    assert acted or not clamps, "nothing was clamped"
    return {"held": True, "passes": PASSES, "acted": acted}


def checks(*, tiny: bool) -> Iterator[Case]:
    """Yield checks with and without clamps, eager and replayed."""
    sizes = ((9, 24, 7),) if tiny else ((24, 576, 32), (300, 2304, 1000))
    for seed, (rows, d_in, watched) in itertools.product(range(1 if tiny else 3), sizes):
        for clamps, replayed in itertools.product((True, False), repeat=2):
            name = (
                f"seed {seed}, {rows} rows, width {d_in}, {watched} watched"
                f"{', clamps' if clamps else ''}, {'replayed' if replayed else 'eager'}"
            )
            run = partial(check, seed, rows, d_in, watched, clamps=clamps, replayed=replayed)
            yield Case(name, run)


def time_op(rows: int, d_in: int, *, clamps: bool) -> Record:
    """Time the op on 32 watched latents, requests of one row each, beside a copy and a product."""
    watched = 32
    _, fused = install(make_list(0, d_in, watched, clamps=clamps), rows)
    hidden = on_grid(rows, d_in).bfloat16()
    residual = torch.zeros_like(hidden)
    moved = 2 * hidden.nbytes + watched * d_in * 4 + rows * watched * 4
    x, out = hidden.float(), torch.empty(rows, watched, device=device())
    ceiling = ceilings(moved, partial(torch.addmm, fused.b, x, fused.W, out=out))
    call = partial(torch.ops.saeguard.tap, hidden, residual, FUSED)
    return {"rows": rows, **compared(times(call), ceiling)}


def op_times(*, tiny: bool) -> Iterator[Case]:
    """Yield times of the op with and without clamps."""
    sizes = ((9, 24),) if tiny else itertools.product((1, 64, 256, 8192), (2304, 4096))
    for (rows, d_in), clamps in itertools.product(sizes, (False, True)):
        name = f"{rows} rows, width {d_in}, 32 watched{', clamps' if clamps else ''}"
        yield Case(name, partial(time_op, rows, d_in, clamps=clamps))
