"""The tap's loop on a CPU: the same as torch, and torch where the loop cannot."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from structlog.testing import capture_logs

from saeguard.guard import host_loop as module
from saeguard.guard.forward_pass import allocate_rows
from saeguard.guard.host_loop import compiled, host_loop
from saeguard.guard.tap import TAPS, Tap, read

CPU = torch.device("cpu")
WIDTH, WATCHED, ROOM = 24, 7, 80


def made(*, loop: bool = True) -> Tap:
    """Return a tap of random encoder rows, with or without its loop."""
    torch.manual_seed(3)
    W, b, theta = torch.randn(WATCHED, WIDTH), torch.randn(WATCHED), torch.rand(WATCHED)
    floor, f, halves = theta.clone(), torch.zeros(ROOM, WATCHED + 1), torch.ones(())
    return Tap(
        layer=0, W=W.t(), b=b, theta=theta, floor=floor, f=f, halves=halves,
        ticks=torch.zeros((), dtype=torch.int64), rows=allocate_rows(ROOM, CPU), clamps={},
        loop=host_loop(W, b, floor, halves, f) if loop else None,
    )  # fmt: skip


def by_loop(tap: Tap, hidden: torch.Tensor, residual: torch.Tensor | None = None) -> bool:
    """Return whether a tap's loop reads some rows."""
    assert tap.loop is not None
    return tap.loop.read(hidden, residual)


def both(hidden: torch.Tensor, residual: torch.Tensor | None, half: float = 1.0) -> Any:
    """Return what the loop and what torch read of some rows."""
    loop, plain = made(), made(loop=False)
    for tap in (loop, plain):
        tap.halves.fill_(half)
    assert by_loop(loop, hidden, residual)
    n = len(hidden)
    read(plain, hidden, residual, plain.f[:n])
    assert not loop.f[n:].any()
    return loop.f[:n], plain.f[:n]


@pytest.mark.parametrize("rows", [1, 5, 32, 33, 71])
@pytest.mark.parametrize("half", [None, 0.0, 1.0])
def test_the_loop_reads_what_torch_reads(rows: int, half: float | None) -> None:
    """Activations and norms, of one tensor and of two halves, in every number of blocks."""
    torch.manual_seed(rows)
    hidden = torch.randn(rows, WIDTH)
    residual = None if half is None else torch.randn(rows, WIDTH)

    loop, plain = both(hidden, residual, half or 0.0)

    torch.testing.assert_close(loop, plain, rtol=1e-4, atol=1e-5)
    assert (loop[:, :-1] == 0).any()
    assert (loop[:, :-1] > 0).any()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_stays_so(bad: float) -> None:
    """A token that cannot be read must not look like one on which nothing fires."""
    hidden = torch.randn(3, WIDTH)
    hidden[1, 4] = bad

    loop, plain = both(hidden, None)

    assert loop.isfinite().all(dim=1).tolist() == plain.isfinite().all(dim=1).tolist()
    assert not loop[1].isfinite().any()


def test_the_loop_is_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """On every machine with vLLM, and so in CI: numba comes with it, and the op runs it."""
    assert compiled() is not None
    tap = made()
    monkeypatch.setitem(TAPS, 0, tap)
    monkeypatch.setattr("saeguard.guard.tap.read", None)

    torch.ops.saeguard.tap(torch.randn(1, 4, WIDTH), torch.randn(1, 4, WIDTH), 0)

    assert int(tap.ticks) == 1
    assert tap.f[:4].isfinite().all()
    assert tap.f[:4].any(dim=1).all()


@pytest.mark.parametrize(
    "hidden",
    [
        torch.randn(4, WIDTH).bfloat16(),
        torch.randn(WIDTH, 4).t(),
        torch.randn(4, WIDTH * 2)[:, ::2],
        torch.randn(4, WIDTH + 1),
        torch.randn(2, 4, WIDTH),
        torch.randn(ROOM + 1, WIDTH),
    ],
    ids=["bfloat16", "transposed", "strided", "width", "dimensions", "rows"],
)
def test_other_rows_are_torchs(hidden: torch.Tensor) -> None:
    """Other layouts and types are read as before, and what does not fit is refused as before."""
    tap = made()
    assert not by_loop(tap, hidden)
    assert not by_loop(tap, torch.randn(4, WIDTH), hidden)
    assert not tap.f.any()


def test_many_rows_are_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A prefill is a product for all threads."""
    monkeypatch.setattr(module, "MOST", WATCHED * WIDTH * 8)
    tap = made()
    assert by_loop(tap, torch.randn(8, WIDTH))
    assert not by_loop(tap, torch.randn(9, WIDTH))


def test_without_numba_torch_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where numba is missing or fails, a tap has no loop, and the log says why."""
    compiled.cache_clear()
    monkeypatch.setattr("saeguard.guard.compiled.why_not", lambda: "no numba here")
    with capture_logs() as logs:
        assert made().loop is None
    assert [(e["log_level"], e["why"]) for e in logs] == [("warning", "no numba here")]
    compiled.cache_clear()


def test_a_wrong_loop_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it reads is compared with torch before it serves."""
    monkeypatch.setattr(module, "compiled", lambda: lambda *_: None)
    with capture_logs() as logs:
        assert made().loop is None
    assert len(logs) == 1


def test_floors_are_read_when_they_change() -> None:
    """A reload writes into the buffers in place; the loop must see it."""
    tap, hidden = made(), torch.randn(4, WIDTH)
    by_loop(tap, hidden)
    assert tap.f[:4, :-1].any()
    tap.floor.fill_(1e9)
    by_loop(tap, hidden)
    assert not tap.f[:4, :-1].any()
