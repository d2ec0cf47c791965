"""Screening TopK latents changes no decision of any policy."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saeguard.features.types import Feature, Term
from saeguard.guard.build_hooks import screen_thresholds
from saeguard.guard.topk import Ranked, RankedRows, apply_topk, make_ranked, set_floor
from saeguard.sae import EncoderRows, encode_latents, encoder_in_memory

CPU = torch.device("cpu")


def random_feature(rng: np.random.Generator, watched: int) -> Feature:
    """Return a weighted group of some of the watched latents."""
    size = int(rng.integers(1, 4))
    terms = tuple(
        Term(int(latent), float(rng.choice([1.0, 0.5, 2.0, -1.0])))
        for latent in rng.choice(watched, size, replace=False)
    )
    low = float(rng.choice([0.0, 0.3, -0.5]))
    return Feature("f", "", "", terms, None, (), low, low + 2.0, 0.5, {})


def take_in(part: RankedRows, rows: EncoderRows) -> Ranked:
    """Return what a tap holds of columns that are `rows`."""
    return make_ranked(part, rows, CPU)


def seen(ranked: Ranked, rows: EncoderRows, x: torch.Tensor) -> torch.Tensor:
    """Return what a tap shows of tokens, [tokens, columns]."""
    floor = rows.theta.clone()
    set_floor(ranked, floor)
    z = x @ rows.W.t() + rows.b
    f = z * (z > floor)
    apply_topk(ranked, x, f)
    return f


@given(st.integers(0, 2**32 - 1))
@settings(derandomize=True, deadline=None, max_examples=60)
def test_no_policy_sees_the_difference(seed: int) -> None:
    """Every feature lies above its threshold, screened or not, on the same tokens."""
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed % 10_000)
    width, watched, k = 60, 8, int(rng.choice([2, 6, 12]))
    rows = EncoderRows(torch.randn(width, 10), torch.zeros(width), torch.zeros(width))
    encoder = encoder_in_memory(rows, k=k, groups=bool(rng.integers(2)))
    x = torch.randn(40, 10)
    features = [random_feature(rng, watched) for _ in range(3)]
    above = [float(a) for a in rng.uniform(0.1, 1.5, 3)]
    lowest = [(g, g.low + a * (g.high - g.low)) for g, a in zip(features, above, strict=True)]
    screen = screen_thresholds(range(watched), lowest)
    exact = encode_latents(encoder, range(watched), x)
    mine = encoder.take(range(watched))
    ranked = take_in(RankedRows(encoder, slice(0, watched), tuple(range(watched)), screen), mine)
    f = seen(ranked, mine, x)
    assert ((f == 0) | (exact != 0)).all(), "what shows as firing fires"
    for feature, value in lowest:
        weights = torch.zeros(watched)
        for term in feature.detect:
            weights[term.latent] = term.weight
        assert torch.equal(f @ weights > value, exact @ weights > value)


def test_what_cannot_be_known_stays_visible() -> None:
    """A token with NaN is not silenced for its rank."""
    rows = EncoderRows(torch.eye(4), torch.zeros(4), torch.zeros(4))
    encoder = encoder_in_memory(rows, k=1)
    mine = encoder.take((0, 1))
    ranked = take_in(RankedRows(encoder, slice(0, 2), (0, 1), torch.ones(2)), mine)
    x = torch.tensor([[torch.nan, 0.0, 0.0, 0.0], [3.0, 2.0, 0.0, 0.0], [0.5, 0.0, 0.0, 0.0]])
    f = seen(ranked, mine, x)
    assert f[0].isnan().all()
    assert f[1:].tolist() == [[3.0, 0.0], [0.0, 0.0]]


def test_a_token_that_passes_shows_what_lies_below_its_bar() -> None:
    """Of it, every watched latent that stays counts: a condition may ask for two of them."""
    rows = EncoderRows(torch.eye(4), torch.zeros(4), torch.zeros(4))
    encoder = encoder_in_memory(rows, k=2)
    mine, screen = encoder.take((0, 1)), torch.tensor([1.0, torch.inf])
    ranked = take_in(RankedRows(encoder, slice(0, 2), (0, 1), screen), mine)
    x = torch.tensor([[3.0, 0.25, 0.0, 0.0], [0.5, 0.25, 0.0, 0.0], [3.0, 0.25, 0.5, 0.0]])
    assert seen(ranked, mine, x).tolist() == [[3.0, 0.25], [0.0, 0.0], [3.0, 0.0]]


def test_columns_of_others_stay_as_they_are() -> None:
    """Where no token passes, what cannot be known stays, and so do columns beside."""
    encoder = encoder_in_memory(EncoderRows(torch.eye(4), torch.zeros(4), torch.zeros(4)), k=1)
    rows = encoder.take((3, 0, 1, 2))
    rows = EncoderRows(rows.W, rows.b, torch.tensor([-torch.inf, 0.0, 0.0, -torch.inf]))
    ranked = take_in(RankedRows(encoder, slice(1, 3), (0, 1), torch.ones(2)), rows)
    x = torch.tensor([[0.5, 0.9, -7.0, -7.0], [3.0, 2.0, -7.0, 7.0]])
    f = seen(ranked, rows, x)
    assert f.tolist() == [[-7.0, 0.0, 0.0, -7.0], [7.0, 0.0, 0.0, -7.0]]
    f = torch.tensor([[7.0, torch.nan, 0.0, 7.0], [7.0, 0.0, 0.0, 7.0]])
    before = f.clone()
    apply_topk(ranked, x, f)
    torch.testing.assert_close(f, before, equal_nan=True)


def test_the_self_test_sees_what_ranks_hide() -> None:
    """While it runs, activations show whatever their rank."""
    rows = EncoderRows(torch.eye(3), torch.zeros(3), torch.zeros(3))
    encoder = encoder_in_memory(rows, k=1)
    ranked = take_in(RankedRows(encoder, slice(0, 3), (0, 1, 2), torch.ones(3)), rows)
    x = torch.tensor([[3.0, 2.0, 0.5]])
    ranked.show_all.fill_(value=True)
    assert seen(ranked, rows, x).tolist() == [[3.0, 2.0, 0.5]]
    ranked.show_all.fill_(value=False)
    assert seen(ranked, rows, x).tolist() == [[3.0, 0.0, 0.0]]
