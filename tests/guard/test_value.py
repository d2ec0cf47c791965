"""A feature's value is added up in one order: in serving, in recordings and in calibration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from saeguard.features.calibrate import shares as calibrated_shares
from saeguard.features.types import Feature, Term
from saeguard.features.value import shares_of, term_values
from saeguard.guard.build_watchlist import _mix
from saeguard.guard.watchlist import WatchList
from saeguard.policy_tools.recording import Recording, definition
from tests.guard.watchlists import make_watchlist

TOKENS, LATENTS = 200, 60


def random_features(rng: np.random.Generator) -> list[Feature]:
    """Return features of up to 40 latents, weights of all sizes, those of most latents first."""
    sizes = sorted(rng.integers(1, 40, 8).tolist(), reverse=True)
    return [
        Feature(
            id=f"f{i}",
            title="t",
            behaviour="b",
            detect=tuple(
                Term(int(latent), float(rng.normal() * 10.0 ** rng.integers(-3, 3)))
                for latent in rng.choice(LATENTS, size, replace=False)
            ),
            probe=None,
            clamp=(),
            low=float(rng.normal()),
            high=float(rng.normal()) + 5.0,
            threshold=0.5,
            evidence={},
        )
        for i, size in enumerate(sizes)
    ]


def serving(features: Sequence[Feature]) -> WatchList:
    """Return a watch list over the features, whose column `i` holds latent `i`."""
    used: Any = {f"set/{feature.id}": (None, feature) for feature in features}
    low = np.array([feature.low for feature in features], np.float32)
    high = np.array([feature.high for feature in features], np.float32)
    mix = _mix(used, {("set", latent): latent for latent in range(LATENTS)})
    return replace(make_watchlist([]), mix=mix, low=low, span=high - low)


def recorded(features: Sequence[Feature], f: np.ndarray) -> np.ndarray:
    """Return the shares that a recording of the activations `f` gives, [tokens, features]."""
    values = [term_values(x.detect, f[:, [t.latent for t in x.detect]]) for x in features]
    parts = {
        x.id: SimpleNamespace(
            probe=None, detect={t.latent: t.weight for t in x.detect}, low=x.low, high=x.high
        )
        for x in features
    }
    sae = SimpleNamespace(sha256="0" * 64, layer=0, topk_measured=None)
    document: Any = SimpleNamespace(id="set", sae=sae, max_norm=None, features=parts)
    recording = Recording(
        path=Path("recording"),
        model="m",
        ids=("text",),
        lengths=np.array([len(f)]),
        prompt_tokens=np.array([0]),
        evaluable=np.ones(len(f), bool),
        definitions={f"set/{x.id}": definition(document, x.id) for x in features},
        values=np.stack(values, 1),
    )
    return np.stack([recording.shares(document, x.id, slice(None)) for x in features], 1)


@pytest.mark.parametrize("seed", range(10))
def test_shares_are_equal_to_the_last_bit(seed: int) -> None:
    """Random latents and weights, many terms a feature: every path rounds alike."""
    rng = np.random.default_rng(seed)
    features = random_features(rng)
    f = np.where(rng.random((TOKENS, LATENTS)) < 0.5, 0.0, rng.lognormal(0, 3, (TOKENS, LATENTS)))
    f = f.astype(np.float32)

    watchlist = serving(features)
    served = watchlist.shares(f)

    assert served.dtype == np.float32
    np.testing.assert_array_equal(recorded(features, f), served)
    for i, feature in enumerate(features):
        value = term_values(feature.detect, f[:, [t.latent for t in feature.detect]])
        np.testing.assert_array_equal(calibrated_shares(feature, value), served[:, i])


def test_clamps_add_up_alike() -> None:
    """The rules on the device, in torch, get the shares of the rules on the host."""
    rng = np.random.default_rng(0)
    watchlist = serving(random_features(rng))
    f = rng.lognormal(0, 3, (TOKENS, LATENTS)).astype(np.float32)
    mix = tuple((torch.from_numpy(c), torch.from_numpy(w)) for c, w in watchlist.mix)
    low, span = torch.from_numpy(watchlist.low), torch.from_numpy(watchlist.span)
    shares = shares_of(mix, low, span, torch.from_numpy(f))
    np.testing.assert_array_equal(shares.numpy(), watchlist.shares(f))
