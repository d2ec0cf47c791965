"""Screening TopK latents changes no decision of any policy."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saeguard.features.types import Feature, Term
from saeguard.guard.ranked import RankedRows, bars, make_ranked, settle
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
    bar = bars(range(watched), lowest)
    exact = encode_latents(encoder, range(watched), x)
    z = x @ rows.W[:watched].t()
    f = z * (z > 0)
    ranked = make_ranked(RankedRows(encoder, slice(0, watched), tuple(range(watched)), bar), CPU)
    settle(ranked, x, f)
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
    ranked = make_ranked(RankedRows(encoder, slice(0, 2), (0, 1), torch.ones(2)), CPU)
    x = torch.tensor([[torch.nan, 0.0, 0.0, 0.0], [3.0, 2.0, 0.0, 0.0], [0.5, 0.0, 0.0, 0.0]])
    z = x @ rows.W[:2].t()
    f = z * (z > 0)
    settle(ranked, x, f)
    assert f[0].isnan().all()
    assert f[1:].tolist() == [[3.0, 0.0], [0.0, 0.0]]


def test_where_no_token_passes() -> None:
    """The short way: silent, but for what cannot be known, and for the self-test."""
    rows = EncoderRows(torch.eye(4), torch.zeros(4), torch.zeros(4))
    latents = RankedRows(encoder_in_memory(rows, k=1), slice(1, 3), (0, 1), torch.ones(2))
    ranked, x = make_ranked(latents, CPU), torch.zeros(2, 4)
    before = torch.tensor([[7.0, torch.nan, 0.5, 7.0], [7.0, 0.9, 0.0, 7.0]])
    f = before.clone()
    settle(ranked, x, f)
    expected = torch.tensor([[7.0, torch.nan, 0.0, 7.0], [7.0, 0.0, 0.0, 7.0]])
    torch.testing.assert_close(f, expected, equal_nan=True)
    ranked.shown.fill_(value=True)
    f = before.clone()
    settle(ranked, x, f)
    torch.testing.assert_close(f, before, equal_nan=True)


def test_the_self_test_sees_what_ranks_hide() -> None:
    """While it runs, activations show whatever their rank."""
    rows = EncoderRows(torch.eye(3), torch.zeros(3), torch.zeros(3))
    encoder = encoder_in_memory(rows, k=1)
    ranked = make_ranked(RankedRows(encoder, slice(0, 3), (0, 1, 2), torch.ones(3)), CPU)
    f = torch.tensor([[3.0, 2.0, 0.5]])
    ranked.shown.fill_(value=True)
    settle(ranked, f.clone(), f)
    assert f.tolist() == [[3.0, 2.0, 0.5]]
    ranked.shown.fill_(value=False)
    settle(ranked, f.clone(), f)
    assert f.tolist() == [[3.0, 0.0, 0.0]]
