"""Child of test_kernels.py: a GPU's ranks in Triton's interpreter, against float64 that sorts."""

from __future__ import annotations

import itertools
from dataclasses import replace

import torch

from saeguard.guard.kernels import topk, topk_buffers, topk_kernels
from saeguard.guard.topk import Ranked, RankedRows, make_ranked
from saeguard.sae import EncoderRows, encoder_in_memory
from saeguard.sae.encoder import token_scale

WATCHED = [3, 40, 41, 77, 78, 120]


def rows_with_ties(latents: int, d_in: int) -> EncoderRows:
    """Return random rows, many of them twice and many within a last bit of another."""
    W, b = torch.randn(latents, d_in).bfloat16().float(), torch.randn(latents)
    twins = torch.arange(1, latents, 2)
    W[twins], b[twins] = W[twins - 1], b[twins - 1]
    near = twins[::3]
    W[near, 0] = torch.nextafter(W[near, 0], torch.full((), torch.inf))
    return EncoderRows(W, b, torch.zeros(latents))


def fires(encoder, rows, z: torch.Tensor) -> torch.Tensor:  # type: ignore[no-untyped-def] # noqa: ANN001
    """Return which latents stay, [tokens, latents] bool, by sorting float64."""
    limit = 1 if encoder.groups else encoder.k
    grouped = z.view(len(z), -1, encoder.group)
    order = grouped.argsort(dim=2, descending=True, stable=True)  # of equals the lower index first
    place = order.argsort(dim=2)
    return (place < limit).view(z.shape) & (z > rows.theta)


def prepare(encoder, rows, screen: torch.Tensor, tokens: int, pairs: int) -> Ranked:  # type: ignore[no-untyped-def] # noqa: ANN001
    """Return what the tap holds, with a column before and one behind those that are ranked."""
    mine = EncoderRows(
        *(torch.cat([t[:1], t[WATCHED], t[:1]]) for t in (rows.W, rows.b, rows.theta))
    )
    part = RankedRows(encoder, slice(1, 1 + len(WATCHED)), tuple(WATCHED), screen)

    def buffers(competitors, watched: int) -> topk_buffers.TopKBuffers:  # type: ignore[no-untyped-def] # noqa: ANN001
        return topk_buffers.allocate_buffers(competitors, watched, max_tokens=tokens, pairs=pairs)

    return make_ranked(part, mine, torch.device("cpu"), allocate_buffers=buffers)


def check() -> tuple[int, int, int]:
    """Compare decisions over kinds, dtypes, halves, norms and bars; return cases, answers, ties."""
    checked = asked = close = 0
    latents, d_in, tokens = 140, 40, 19
    kinds = ((8, False), (1, False), (35, True), (100, False))
    norms = ("none", "layer_norm", "constant_norm_rescale")
    for case, (norm, (k, groups)) in enumerate(itertools.product(norms, kinds)):
        second, high = case % 3 == 0, case % 5 < 2
        rows = rows_with_ties(latents, d_in)
        encoder = encoder_in_memory(rows, k=k, groups=groups, norm=norm)
        dtype = torch.bfloat16 if second else torch.float32
        hidden = torch.randn(tokens, d_in).to(dtype)
        residual = torch.randn(tokens, d_in).to(dtype) if second else None
        x = hidden.float() + (0 if residual is None else residual.float())
        scale = token_scale(norm, x)
        by = torch.ones(tokens, 1) if scale is None else scale
        z = (x.double() @ rows.W.double().t()) * by.double() + rows.b.double()
        screen = torch.full((len(WATCHED),), float(z.quantile(0.95)) if high else 0.0)
        screen[0] = torch.inf  # alone it makes nothing hold
        ranked = prepare(encoder, rows, screen, tokens, topk_buffers.PAIRS)
        pre = (x @ rows.W.t()) * by + rows.b
        f = torch.full((tokens, 2 + len(WATCHED)), 7.0)
        first = pre[:, WATCHED] * (pre[:, WATCHED] > 0)
        f[:, 1:-1] = first
        scales = None if scale is None else scale.expand(f.shape).contiguous()
        topk.apply_topk(ranked, hidden, residual, torch.ones(()), f, scales)
        passed = (first > screen).any(1, keepdim=True)
        expected = first * (passed & fires(encoder, rows, z)[:, WATCHED])
        assert torch.equal(f[:, 1:-1], expected), (k, groups, norm, second, high)
        assert (f[:, [0, -1]] == 7.0).all(), "other columns stay as they are"
        assert ranked.buffers is not None
        assert (passed.any() and not passed.all()) or not high
        checked, asked = checked + 1, asked + int((first[passed[:, 0]] > 0).sum())
        close += int(ranked.buffers.counters[topk_kernels.CLOSE.value])

        ranked.show_all.fill_(True)
        f[:, 1:-1] = first
        topk.apply_topk(ranked, hidden, residual, torch.ones(()), f, scales)
        assert torch.equal(f[:, 1:-1], first), "the self-test sees all"
    return checked, asked, close


def check_faults() -> None:
    """What cannot be told is NaN: a token that is, and pairs for which there is no room."""
    rows = rows_with_ties(140, 40)
    rows = replace(rows, W=rows.W[:1].expand(140, 40).contiguous(), b=torch.zeros(140))
    encoder = encoder_in_memory(rows, k=100)  # of equals the first 100
    hidden = torch.randn(5, 40)
    hidden *= torch.where(hidden @ rows.W[0] < 0, -1.0, 1.0)[:, None]
    hidden[3, 2] = torch.nan
    screen = torch.zeros(len(WATCHED))
    pre = (hidden @ rows.W.t())[:, WATCHED]
    for pairs in (5 * 140 * len(WATCHED), 100):
        ranked = prepare(encoder, rows, screen, 5, pairs)
        f = torch.zeros(5, 2 + len(WATCHED))
        f[:, 1:-1] = pre * (pre > 0)
        topk.apply_topk(ranked, hidden, None, torch.ones(()), f)
        assert f[3, 1:-1].isnan().all()
        told = f[[0, 1, 2, 4], 1:-1]
        if pairs == 100:
            assert told.isnan().all(), "not known, and never silent"
        else:
            assert torch.equal(told != 0, (torch.tensor(WATCHED) < 100).expand(4, -1))


if __name__ == "__main__":
    torch.manual_seed(0)
    torch.set_num_threads(1)
    topk.PROGRAMS = 4  # of hundreds, nearly all idle here; the interpreter runs each in turn
    cases, answers, ties = check()
    check_faults()
    assert answers > 300, answers
    assert ties > 30, ties
    print(f"rank {cases}")
