"""A feature's value is added up in one order, in serving, in recordings and in calibration."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from saeguard.features.calibrate import shares as calibrated_shares
from saeguard.features.schema import Document
from saeguard.features.types import Feature, Term
from saeguard.features.value import make_mix, shares_of, term_values
from saeguard.policy_tools.recording import Recording, definition

TOKENS, LATENTS = 200, 60


def random_features(rng: np.random.Generator) -> list[list[Term]]:
    """Return features of up to 40 weighted latents, those of most latents first."""
    sizes = sorted(rng.integers(1, 40, 8).tolist(), reverse=True)
    return [
        [
            Term(int(latent), float(rng.normal() * 10.0 ** rng.integers(-3, 3)))
            for latent in rng.choice(LATENTS, size, replace=False)
        ]
        for size in sizes
    ]


def document(features: list[list[Term]], ranges: list[tuple[float, float]]) -> Document:
    """Return a feature set's file that holds the features."""
    return Document.model_validate(
        {
            "schema": "saeguard.features/v1",
            "id": "set",
            "model": {"name": "m", "n_layers": 2, "d_model": 8},
            "sae": {"path": "sae", "sha256": "0" * 64, "layer": 0, "d_in": 8},
            "features": {
                f"f{i}": {
                    "title": "t",
                    "detect": {term.latent: term.weight for term in terms},
                    "low": low,
                    "high": high,
                }
                for i, (terms, (low, high)) in enumerate(zip(features, ranges, strict=True))
            },
        }
    )
