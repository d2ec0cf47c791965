"""Child of test_kernels.py: the tap op as a GPU runs it, in Triton's interpreter."""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import torch

from saeguard.guard.install_taps import install_taps
from saeguard.guard.kernels import tap, topk
from saeguard.guard.tap import Kernels, Tap
from saeguard.guard.topk import RankedRows
from saeguard.guard.watchlist import ClampRows
from saeguard.sae import EncoderRows, encoder_in_memory
from tests.guard.test_tap_clamp import FEATURES, MAX_TOKENS, admit, check, run, simple
from tests.guard.test_tap_clamp import Request as Clamped
from tests.guard.watchlists import make_hook, make_watchlist

CPU = torch.device("cpu")
KERNELS = Kernels(tap.read, tap.edit, topk.apply_topk)


def ranked_tap() -> Tap:
    """Install a clamp that sets a value, on latents of which two of twenty fire."""
    extra = torch.randint(-8, 9, (15, FEATURES)) / 8  # beside the watched ones, which are first
    W = torch.cat([torch.eye(FEATURES), extra])
    zero = torch.zeros(len(W))
    encoder = encoder_in_memory(EncoderRows(W, zero, zero), k=2)
    screen = torch.tensor([0.0, *[0.5] * (FEATURES - 1)])  # what is clamped counts on every token
    part = RankedRows(encoder, slice(0, FEATURES), tuple(range(FEATURES)), screen)
    hook = replace(make_hook(), theta=torch.zeros(FEATURES), ranked=(part,))
    edit = ClampRows(0, (0,), (0,), (0,), torch.full((1,), 0.25), torch.eye(FEATURES)[:1])
    watchlist = make_watchlist([simple()], [hook], [edit])
    return install_taps(watchlist, max_tokens=MAX_TOKENS, slots=2, device=CPU)[0]


def check_ranked() -> None:
    """The op reads, ranks and edits as it does without kernels, bit for bit."""
    x = torch.randint(-8, 9, (30, FEATURES)) / 8
    seen = []
    for kernels in (None, KERNELS):
        torch.manual_seed(1)
        with mock.patch("saeguard.guard.install_taps.kernels_for", return_value=kernels):
            ranked = ranked_tap()
        admit(ranked, Clamped(1, 1, ["user"], [True]))
        hidden = run(ranked, 1, 0, x)
        assert int(ranked.ticks) == 1
        clamp = next(iter(ranked.clamps.values()))
        assert clamp.launch is (kernels and tap.edit)
        assert (clamp.on_host is None) == (kernels is not None), "the kernels run"
        seen.append((ranked.f[: len(x)].clone(), hidden))
    (f, hidden), (by_kernels, edited) = seen
    assert torch.equal(f[:, :-1], by_kernels[:, :-1])
    torch.testing.assert_close(f[:, -1], by_kernels[:, -1])
    assert torch.equal(hidden, edited)
    assert not torch.equal(hidden, x), "some are edited"
    assert 0 < int((f[:, :-1] != 0).sum()) < int((x > 0).sum()), "ranks silence some"


if __name__ == "__main__":
    torch.manual_seed(0)
    torch.set_num_threads(1)
    topk.PROGRAMS = 4
    with mock.patch("saeguard.guard.install_taps.kernels_for", return_value=KERNELS):
        for seed in range(8):
            check(seed)
    check_ranked()
    print("op 8")
