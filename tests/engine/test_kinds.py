"""SAEs of other kinds than JumpReLU, served: what is seen is what SAELens computes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests import models
from tests.engine import engines

pytestmark = pytest.mark.engine

KINDS = {
    "topk": {"kind": "topk", "k": 24},
    "gated": {"kind": "gated", "normalize_activations": "layer_norm"},
    "scaled": {"kind": "jumprelu", "normalize_activations": "constant_norm_rescale"},
}
ABOVE = 0.3


def test_topk_gated_and_normalised_side_by_side(tmp_path: Path) -> None:
    """Three SAEs of three kinds on one layer, in one tap: activations and verdicts hold.

    A TopK latent may show as silent where it lies below every policy's threshold; above, its rank
    decides, and it must be SAELens' decision.
    """
    model = models.make_model("llama", tmp_path / "model", 0)
    latents = tuple(range(0, 256, 4))
    for seed, (name, options) in enumerate(KINDS.items()):
        sae = models.make_sae(tmp_path / name, seed=seed, **options)
        models.write_feature_set(
            tmp_path / "feature_sets" / f"{name}.yaml", sae, latents=latents, high=8.0
        )
        for latent in latents:
            models.write_policy(
                tmp_path / "policies" / f"{name}.p{latent}.yaml",
                feature_set=name,
                detect={"a": {"feature": f"f{latent}", "above": ABOVE}},
                condition="a",
            )
    settings = {
        "policies": str(tmp_path / "policies"),
        "feature_sets": str(tmp_path / "feature_sets"),
        "events": str(tmp_path / "events.jsonl"),
    }
    served = engines.serve(
        tmp_path / "served",
        {
            "model": str(model),
            "enforce_eager": True,
            "additional_config": {"saeguard": settings},
        },
        [engines.requests(engines.random_prompts(6, seed=1))],
    )
    assert "ranks latents exactly" in served.log
    watchlist = engines.compile_policies(settings)
    events = engines.events_by_request(tmp_path / "events.jsonl")
    outranked = matched = 0
    for name in KINDS:
        reference = engines.Reference(model, tmp_path / name)
        features = [watchlist.features.index(f"{name}/f{latent}") for latent in latents]
        columns = [watchlist.latents(feature)[0][0] for feature in features]
        for result in served.results:
            positions, f = served.activations[result["id"]]
            tokens = [*result["prompt"], *result["output"]][:-1]
            assert positions.tolist() == list(range(len(tokens)))
            full = reference.latents(tokens)
            expected, got = full[:, latents], f[:, columns]
            close = 2e-4 * full.max()
            shown = got > 0
            np.testing.assert_allclose(got[shown], expected[shown], rtol=0, atol=close)
            bar = ABOVE * 8.0 if name == "topk" else close
            assert (expected[~shown] <= bar + close).all()
            if name == "topk":
                x = reference.model(
                    torch.tensor([tokens]), output_hidden_states=True
                ).hidden_states[2][0]
                pre = (x - reference.sae.b_dec) @ reference.sae.W_enc + reference.sae.b_enc
                high = pre[:, list(latents)].detach().numpy() > bar
                outranked += int((high & (expected == 0)).sum())
            for latent, column in zip(latents, expected[1:].T, strict=True):
                if np.abs(column - ABOVE * 8.0).min() > close:  # BOS is not looked at
                    event = events[result["id"]][f"{name}.p{latent}"]
                    assert event["matched_tokens"] == (column > ABOVE * 8.0).sum()
                    matched += event["matched_tokens"]
    assert outranked > 50, "ranks must have mattered"
    assert matched > 500
