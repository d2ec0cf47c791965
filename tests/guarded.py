"""A feature set on a random SAE and policies over it, for a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from saeguard.features.load import save_feature_set
from saeguard.features.types import Feature, FeatureSet, ModelRef, SaeRef, Term
from saeguard.policy.types import Action, Clamp, Mode, Name, Policy, Selection, Window
from saeguard.sae import inspect

LAYER, LATENTS = 1, 64


def feature_set(folder: Path, width: int) -> FeatureSet:
    """Save and return a set of one feature, `loud`, which fires on some tokens of any text."""
    torch.manual_seed(11)
    sae = folder / "sae"
    sae.mkdir(parents=True)
    directions = torch.nn.functional.normalize(torch.randn(LATENTS, width), dim=1)
    tensors = {
        "W_enc": directions.t().contiguous(),
        "b_enc": torch.zeros(LATENTS),
        "W_dec": directions,
        "b_dec": torch.zeros(width),
        "threshold": torch.full((LATENTS,), 0.1),
    }
    save_file(tensors, sae / "sae_weights.safetensors")
    cfg = {
        "architecture": "jumprelu",
        "d_in": width,
        "d_sae": LATENTS,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": False,
        "metadata": {"hook_name": f"blocks.{LAYER}.hook_resid_post"},
    }
    (sae / "cfg.json").write_text(json.dumps(cfg))
    info = inspect(sae)
    loud = Feature(
        id="loud",
        title="Loud",
        behaviour="noise",
        detect=(Term(1, 1.0), Term(2, 0.5)),
        probe=None,
        clamp=(Term(1, 1.0), Term(9, 2.0)),
        low=0.0,
        high=1.0,
        threshold=0.5,
        evidence={},
    )
    features = FeatureSet(
        id="demo",
        path=folder / "demo.yaml",
        model=ModelRef("tiny", width, 3),
        sae=SaeRef(sae, info.sha256, info.layer, width, LATENTS),
        features={"loud": loud},
        exclude_tokens=(0, 1, 2),
        digest="",
    )
    save_feature_set(features, features.path)
    return features


def policy(action: Action, *, mode: Mode = "enforce", above: float = 0.5) -> Policy:
    """Return a policy on the output of a text."""
    return Policy(
        id="noise.loud",
        title="Loud",
        owner="o@example.com",
        severity="low",
        mode=mode,
        action=action,
        on_error="allow",
        scope="output",
        uncached="count",
        feature_set="demo",
        rationale="",
        falsepositives=(),
        review_by=None,
        detect={"loud": Selection("loud", above)},
        condition=Name("loud"),
        window=Window(),
        keep=0,
        clamp=Clamp(("loud",), 0.25) if action == "clamp" else None,
        exceptions=(),
        path=Path("loud.yaml"),
        digest="0",
    )
