"""Ranks of TopK and groupmax latents on the device: against exact decisions, and their times."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, partial

import torch

from benchmarks.gpu_record import Case, Record
from benchmarks.gpu_timing import captured, ceilings, compared, device, times
from saeguard.guard.kernels import tap, topk
from saeguard.guard.kernels.topk_buffers import allocate_buffers
from saeguard.guard.kernels.topk_kernels import CLOSE, LISTED
from saeguard.guard.topk import Ranked, RankedRows, make_ranked
from saeguard.sae import EncoderRows, encoder_in_memory
from saeguard.sae.checkpoint_info import Norm
from saeguard.sae.topk_watched import Competitors, drop, read_competitors
from tests.kernels.check_rank import rows_with_ties

WATCHED, K = 32, 64
SIZES = ((576, 16_384), (2304, 65_536), (4096, 131_072))
"""Width and latents."""
ROWS = (1, 64, 256, 2048, 8192)
ONE_IN = 1000
"""Of so many tokens one clears the screen, at least one."""
ROUNDS = 3


@dataclass(frozen=True)
class Ranks:
    """Buffers of one pass by rank; they stay where they are."""

    rows: EncoderRows
    """Of the watched latents."""
    ranked: Ranked
    hidden: torch.Tensor
    residual: torch.Tensor
    halves: torch.Tensor
    f: torch.Tensor
    scale: torch.Tensor | None
    norm: torch.Tensor | None

    @property
    def fired(self) -> torch.Tensor:
        """Return the activations in `f`, without the norms."""
        return self.f[:, :-1]

    def read(self) -> None:
        """Launch the read alone."""
        tap.read(
            self.hidden, self.residual, self.halves, self.rows.W, self.rows.b, self.rows.theta,
            self.f, self.norm, self.scale,
        )  # fmt: skip

    def rank(self) -> None:
        """Launch what ranks the activations in `f`."""
        topk.apply_topk(self.ranked, self.hidden, self.residual, self.halves, self.f, self.scale)

    def run(self) -> None:
        """Launch both, as the tap does."""
        self.read()
        self.rank()


def make_ranks(ranked: Ranked, rows: EncoderRows, tokens: int, norm: Norm) -> Ranks:
    """Allocate the buffers."""
    on, watched = device(), len(rows.b)
    hidden = torch.zeros(tokens, rows.W.shape[1], dtype=torch.bfloat16, device=on)
    kind = ("none", "layer_norm", "constant_norm_rescale").index(norm)
    f = torch.zeros(tokens, watched + 1, device=on)
    return Ranks(
        rows=rows,
        ranked=ranked,
        hidden=hidden,
        residual=torch.zeros_like(hidden),
        halves=torch.ones((), device=on),
        f=f,
        scale=None if norm == "none" else torch.zeros_like(f),
        norm=None if norm == "none" else torch.full((watched,), kind, device=on),
    )


def check(latents: int, d_in: int, tokens: int, k: int, norm: Norm, *, groups: bool) -> Record:
    """Compare decisions, eager and replayed, with those of exact arithmetic, ties among them."""
    on, watched = device(), tuple(range(0, latents, latents // min(WATCHED, latents // 8)))
    host = encoder_in_memory(rows_with_ties(latents, d_in), k=k, groups=groups, norm=norm)
    exact = read_competitors(host, watched)  # on the CPU, which decides exactly
    rows = host.block(0, latents).to(on)
    encoder = encoder_in_memory(rows, k=k, groups=groups, norm=norm)
    part = RankedRows(encoder, slice(0, len(watched)), watched, torch.zeros(len(watched)))
    mine = encoder.take(watched)
    allocate = partial(allocate_buffers, max_tokens=tokens)
    ranked = make_ranked(part, mine, on, allocate_buffers=allocate)
    ranks = make_ranks(ranked, mine, tokens, norm)
    replay, held, passed, kept, close = captured(ranks.run), True, 0, 0, 0
    for _, call in itertools.product(range(ROUNDS), (ranks.run, replay)):
        for half in (ranks.hidden, ranks.residual):
            half.copy_(torch.randn(half.shape, device=on))
        ranks.read()
        first = ranks.fired.clone()
        screen = torch.quantile(first.amax(1), torch.tensor(0.5, device=on))  # half of them pass
        ranked.screen.fill_(float(screen) if tokens > 1 else 0.0)
        clears = (first > ranked.screen).any(1, keepdim=True)
        expected = first * clears
        x = ranks.hidden.float() + ranks.residual.float()
        expected = expected.cpu()
        drop(exact, x.cpu(), expected)
        ranks.f.fill_(7e7)
        call()
        held &= torch.equal(ranks.fired.cpu(), expected)
        passed, kept = passed + int((first * clears > 0).sum()), kept + int((expected > 0).sum())
        assert ranked.buffers is not None
        close += int(ranked.buffers.counters[CLOSE.value])
    return {"held": held, "asked": passed, "kept": kept, "close_pairs": close}


def checks(*, tiny: bool) -> Iterator[Case]:
    """Yield checks over norms, TopK and groupmax, and rows."""
    latents, d_in = (96, 24) if tiny else (4096, 576)
    norms: tuple[Norm, ...] = ("none", "layer_norm", "constant_norm_rescale")
    for norm, (k, groups), tokens in itertools.product(
        norms[1:2] if tiny else norms,
        ((8, False), (24, True)) if tiny else ((64, False), (1024, True)),
        (5,) if tiny else (1, 37, 300),
    ):
        kind = "groupmax" if groups else "topk"
        name = f"{kind} {k} of {latents}, width {d_in}, {norm}, {tokens} rows"
        yield Case(name, partial(check, latents, d_in, tokens, k, norm, groups=groups))


@cache
def competing(d_in: int, latents: int) -> Competitors:
    """Return a random TopK encoder in bfloat16, of which the first latents are watched."""
    on = device()
    W = torch.randn(latents, d_in, device=on, dtype=torch.bfloat16).mul_(d_in**-0.5)
    zero = torch.zeros(latents, device=on)
    encoder = encoder_in_memory(EncoderRows(W, zero, zero), k=min(K, latents // 2))
    return read_competitors(encoder, range(min(WATCHED, latents // 8)), on)


def time_ranks(d_in: int, latents: int, tokens: int, *, some: bool) -> Record:
    """Time read and ranks together where no token clears the screen, or one in a thousand does."""
    on, competitors = device(), competing(d_in, latents)
    watched = len(competitors.own)
    W = competitors.rows.W[:watched].float()
    rows = EncoderRows(W, *(t[:watched] for t in (competitors.rows.b, competitors.rows.theta)))
    ranked = Ranked(
        competitors=competitors,
        columns=slice(0, watched),
        rows=rows,
        screen=torch.full((watched,), torch.inf, device=on),
        show_all=torch.zeros((), dtype=torch.bool, device=on),
        buffers=allocate_buffers(competitors, watched, max_tokens=tokens),
    )
    ranks = make_ranks(ranked, rows, tokens, "none")
    ranks.hidden.copy_(torch.randn(ranks.hidden.shape, device=on))
    ranks.read()
    passing = max(1, tokens // ONE_IN) if some else 0
    if passing:
        peak = (
            torch.cat([ranks.fired.amax(1), torch.zeros(1, device=on)]).sort(descending=True).values
        )
        ranked.screen.fill_(float(peak[passing - 1 : passing + 1].mean()))
    replay = captured(ranks.run)
    x = ranks.hidden.float()
    moved = 2 * ranks.hidden.nbytes + W.nbytes + ranks.f.nbytes
    bare = partial(torch.mm, x, W.t(), out=torch.empty_like(ranks.fired))
    if passing:
        moved += competitors.rows.W.nbytes
        wide = competitors.rows.W[: min(latents, 1 << 16)].float()  # a part: it stands for the rest
        bare = partial(torch.mm, x[:passing].contiguous(), wide.t())
    found = compared(times(ranks.run, replay), ceilings(moved, bare))
    assert ranked.buffers is not None
    return {"rows": tokens, "listed": int(ranked.buffers.counters[LISTED.value]), **found}


def rank_times(*, tiny: bool) -> Iterator[Case]:
    """Yield times over sizes, rows and screens."""
    for d_in, latents in ((24, 96),) if tiny else SIZES:
        for tokens, some in itertools.product((5,) if tiny else ROWS, (False, True)):
            told = "one in a thousand passes" if some else "none passes"
            name = f"width {d_in}, {latents} latents, {tokens} rows, {told}"
            yield Case(name, partial(time_ranks, d_in, latents, tokens, some=some))
        competing.cache_clear()
