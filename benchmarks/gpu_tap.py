"""The tap's read and edit on the device: against float64 and plain torch, and their times.

Two kinds of numbers. On a grid of eighths every sum is exact in float32, so results must be equal
bit for bit. Random ones must lie within the bound that rounding has, `gamma * |x| * |w|`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch

from benchmarks.gpu_record import Case, Record
from benchmarks.gpu_timing import captured, ceilings, compared, device, times
from saeguard.guard.kernels import tap
from saeguard.sae.encoder import NORMS, column_scales

KINDS = (
    ("bfloat16", True, False),
    ("bfloat16", True, True),
    ("float32", False, False),
    ("float16", False, True),
)
"""Residual's dtype, whether it comes in two halves, whether tokens are normalised."""
CHECKED = ((1, 576, 32), (16, 2304, 1000), (300, 4096, 1000))
"""Rows, width, watched latents."""
CHECKED_TINY = ((1, 24, 3), (20, 40, 17))
ROWS, WIDTHS, WATCHED = (1, 8, 64, 256, 2048, 8192), (576, 2304, 4096), (32, 1000, 10_000)
ROWS_TINY, WIDTHS_TINY, WATCHED_TINY = (3,), (24,), (5,)
ROUNDS = 3
"""Inputs that a graph is replayed on after its capture."""
NORM_ERROR = 2e-4
"""Relative error that a token's norm adds, beside that of the product."""


@dataclass(frozen=True)
class Read:
    """Buffers of one read; they stay where they are, what is in them changes."""

    hidden: torch.Tensor
    residual: torch.Tensor | None
    halves: torch.Tensor
    W: torch.Tensor
    b: torch.Tensor
    theta: torch.Tensor
    f: torch.Tensor
    """[rows + 2, watched + 1]: two rows lie behind the pass, and must stay as they are."""
    norm: torch.Tensor | None
    scale: torch.Tensor | None

    def run(self) -> None:
        """Launch the kernel."""
        rows = len(self.hidden)
        scale = None if self.scale is None else self.scale[:rows]
        tap.read(
            self.hidden, self.residual, self.halves, self.W, self.b, self.theta,
            self.f[:rows], self.norm, scale,
        )  # fmt: skip

    def poison(self) -> None:
        """Fill what is written with what is never right."""
        self.f.fill_(7e7)
        if self.scale is not None:
            self.scale.fill_(7e7)


def on_grid(*shape: int) -> torch.Tensor:
    """Return eighths from -1 to 1: sums of products of a few thousand are exact in float32."""
    return torch.randint(-8, 9, shape, device=device()) / 8


def make_read(
    rows: int, d_in: int, watched: int, dtype: torch.dtype, *, second: bool, normed: bool
) -> Read:
    """Allocate the buffers."""
    on = device()
    theta = on_grid(watched).abs()
    theta[::3] = -torch.inf  # probes
    kinds = torch.arange(watched, device=on) % len(NORMS)
    hidden = torch.zeros(rows, d_in, dtype=dtype, device=on)
    f = torch.zeros(rows + 2, watched + 1, device=on)
    return Read(
        hidden=hidden,
        residual=torch.zeros_like(hidden) if second else None,
        halves=torch.ones((), device=on),
        W=on_grid(watched, d_in).contiguous(),
        b=on_grid(watched),
        theta=theta,
        f=f,
        norm=kinds if normed else None,
        scale=torch.zeros_like(f) if normed else None,
    )


def fill(read: Read, *, exact: bool) -> None:
    """Put new inputs into the buffers."""
    for half in (read.hidden, read.residual):
        if half is not None:
            new = on_grid(*half.shape) if exact else torch.randn(half.shape, device=half.device)
            half.copy_(new)
    if not exact:
        read.W.copy_(torch.randn_like(read.W))
    read.halves.fill_(float(torch.randint(2, ()).item()))


def stream(read: Read) -> torch.Tensor:
    """Return the residual stream in float32."""
    x = read.hidden.float()
    return x if read.residual is None else torch.addcmul(x, read.residual.float(), read.halves)


def worst(read: Read) -> float:
    """Return the largest error as a share of what rounding may do; infinite where it is wrong.

    Within rounding of its threshold a latent may show or not.
    """
    x = stream(read)
    scale = column_scales(read.norm, x)
    wide = x.double()
    z = wide @ read.W.double().t()
    bound = wide.norm(dim=1)[:, None] * read.W.double().norm(dim=1) * (x.shape[1] + 16) * 2.0**-24
    if scale is not None:
        z, bound = z * scale.double(), bound * scale.double()
        bound += NORM_ERROR * z.abs()
    z += read.b.double()
    bound += 1e-6 * (1 + z.abs())
    shown = read.f[: len(x), :-1].double()
    error = (shown - z).abs() / bound
    surely, never = z - bound > read.theta, z + bound <= read.theta
    right = error <= 1  # never of NaN
    wrong = (surely & ~right) | (never & (shown != 0))
    wrong |= ~surely & ~never & (shown != 0) & ~right
    return float("inf") if wrong.any() else float(error[surely].max()) if surely.any() else 0.0


def check(read: Read, *, exact: bool) -> Record:
    """Compare eager calls and replays of one capture, on inputs that change between them."""
    largest, same = 0.0, True
    replay = captured(read.run)
    for _, call in itertools.product(range(ROUNDS), (read.run, replay)):
        fill(read, exact=exact)
        read.poison()
        call()
        if exact:
            z = stream(read).double() @ read.W.double().t() + read.b
            expected = (z * (z > read.theta)).float()
            same &= torch.equal(read.f[: len(expected), :-1], expected)
        else:
            largest = max(largest, worst(read))
        same &= bool((read.f[len(read.hidden) :] == 7e7).all())
    read.hidden[0, 0] = torch.nan
    replay()
    same &= bool(read.f[0].isnan().all()) and not read.f[1:].isnan().any()
    return {"held": same and largest <= 1, "error": largest} if not exact else {"held": same}


def read_checks(*, tiny: bool) -> Iterator[Case]:
    """Yield checks of the read over dtypes, halves, norms and sizes."""
    for (name, second, normed), sizes in itertools.product(
        KINDS, CHECKED_TINY if tiny else CHECKED
    ):
        kind = f"{name}{', two halves' if second else ''}{', normed' if normed else ''}"
        make = partial(make_read, *sizes, getattr(torch, name), second=second, normed=normed)
        shape = "{} rows, width {}, {} watched".format(*sizes)
        if not normed:
            yield Case(f"{kind}, {shape}, exact", lambda make=make: check(make(), exact=True))
        yield Case(f"{kind}, {shape}", lambda make=make: check(make(), exact=False))


def check_edit(rows: int, d_in: int, clamped: int, dtype: torch.dtype, *, scaled: bool) -> Record:
    """Compare the edit with plain torch, eagerly and replayed; rows that do not act may be NaN."""
    on, rules, watched = device(), 4, 9
    hidden, f = torch.empty(rows, d_in, dtype=dtype, device=on), on_grid(rows, watched)
    acted = torch.zeros(rows, rules, dtype=torch.bool, device=on)
    columns, owner = (torch.randint(n, (clamped,), device=on) for n in (watched, rules))
    target, W_dec = on_grid(clamped), on_grid(clamped, d_in)
    scale = torch.full_like(f, 0.5) if scaled else None  # a power of two: still exact
    run = partial(tap.edit, hidden, f, acted, columns, owner, target, W_dec, scale)
    acted.fill_(False)
    replay, held = captured(run), True
    for call in (run, replay, replay):
        hidden.copy_(on_grid(rows, d_in))
        f.copy_(on_grid(rows, watched))
        acted.copy_(torch.rand(rows, rules, device=on) < 0.5)
        acted[-1], f[-1] = False, torch.nan
        change = target - f[:, columns]
        if scale is not None:
            change = change / scale[:, columns]
        change = torch.where(acted[:, owner], change, 0.0)
        expected = hidden.clone().add_((change @ W_dec).to(dtype))
        call()
        held &= torch.equal(hidden, expected)
    return {"held": held}


def edit_checks(*, tiny: bool) -> Iterator[Case]:
    """Yield checks of the edit."""
    sizes = ((5, 24, 3),) if tiny else ((1, 576, 1), (7, 2304, 4), (300, 4096, 32))
    for (rows, d_in, clamped), name, scaled in itertools.product(
        sizes, ("float32", "bfloat16"), (False, True)
    ):
        yield Case(
            f"{name}, {rows} rows, width {d_in}, {clamped} clamped{', scaled' if scaled else ''}",
            partial(check_edit, rows, d_in, clamped, getattr(torch, name), scaled=scaled),
        )


def time_read(rows: int, d_in: int, watched: int) -> Record:
    """Time a read of bfloat16 in two halves beside a copy and a product in float32."""
    read = make_read(rows, d_in, watched, torch.bfloat16, second=True, normed=False)
    fill(read, exact=False)
    x, f, W = stream(read), read.f[:rows, :-1].contiguous(), read.W.t()
    moved = sum(t.nbytes for t in (read.hidden, read.hidden, read.W, f))
    ceiling = ceilings(moved, partial(torch.addmm, read.b, x, W, out=torch.empty_like(f)))
    return {"rows": rows, **compared(times(read.run), ceiling)}


def read_times(*, tiny: bool) -> Iterator[Case]:
    """Yield times of the read over widths, watched latents and rows."""
    every = (WIDTHS_TINY, WATCHED_TINY, ROWS_TINY) if tiny else (WIDTHS, WATCHED, ROWS)
    for d_in, watched, rows in itertools.product(*every):
        name = f"width {d_in}, {watched} watched, {rows} rows"
        yield Case(name, partial(time_read, rows, d_in, watched))


def time_edit(rows: int, d_in: int, clamped: int) -> Record:
    """Time an edit of every row beside a copy of what it reads and writes."""
    on = device()
    hidden = torch.randn(rows, d_in, device=on).bfloat16()
    f = torch.zeros(rows, 32, device=on)
    acted = torch.ones(rows, 4, dtype=torch.bool, device=on)
    columns, owner = (torch.randint(n, (clamped,), device=on) for n in (32, 4))
    W_dec = torch.randn(clamped, d_in, device=on)
    # At their targets already: however often it runs, the residual stays as it is.
    target = torch.zeros(clamped, device=on)
    run = partial(tap.edit, hidden, f, acted, columns, owner, target, W_dec)
    return {"rows": rows, **compared(times(run), ceilings(2 * hidden.nbytes + W_dec.nbytes))}


def edit_times(*, tiny: bool) -> Iterator[Case]:
    """Yield times of the edit."""
    for d_in, clamped, rows in (
        ((24, 2, 3),) if tiny else itertools.product((576, 4096), (4, 32), (1, 64, 256, 8192))
    ):
        name = f"width {d_in}, {clamped} clamped, {rows} rows"
        yield Case(name, partial(time_edit, rows, d_in, clamped))
