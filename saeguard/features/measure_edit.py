"""Measure how large a clamp's edit is beside the residual that it edits."""

from __future__ import annotations

import numpy as np
import torch

from saeguard.features.corpus import Corpus
from saeguard.features.types import Feature, FeatureSet
from saeguard.sae import read_decoder_rows
from saeguard.sae.encoder import token_scale


def measure_edit(features: FeatureSet, feature: Feature, ordinary: Corpus) -> dict[str, float]:
    """Return the norms that the evidence keeps of a feature's clamp latents.

    `per_activation` is the norm of `sum(weight * W_dec[latent])`, in the residual's units: medians
    over the tokens in scope of ordinary texts. `residual` is the median norm of the residual there.

    Raises:
        SaeError: the decoder cannot be read.
    """
    assert features.sae is not None  # a set with clamp latents has one
    info = features.sae.inspect()
    x = ordinary.at(info.layer)[torch.from_numpy(ordinary.looked)].float()
    rows = read_decoder_rows(info, [term.latent for term in feature.clamp])
    weights = torch.tensor([term.weight for term in feature.clamp])
    norm = float(torch.linalg.vector_norm(weights @ rows))
    scale = token_scale(info.norm, x)
    if scale is not None:
        norm /= float(scale.median())
    residual = float(np.median(torch.linalg.vector_norm(x, dim=1).numpy()))
    return {"per_activation": float(f"{norm:.4g}"), "residual": float(f"{residual:.4g}")}
