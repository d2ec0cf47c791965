"""The conditions of a comparison, each with its policy and feature set on disk.

Every arm is a shadow policy that clamps at every token of the request that is not excluded, so that
a difference between arms is one of what is edited, not of when. A latent can have one clamp per
feature set; so each arm has a feature set of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from saeguard.effect.edits import EditSpec
from saeguard.effect.random_latents import Usual, draw, scale_to_norm
from saeguard.features.load import save_feature_set
from saeguard.features.types import Feature, FeatureSet, SaeRef, Term
from saeguard.sae import activate, read_decoder_rows, read_rows
from saeguard.sae.encoder import token_scale

OFF, ASKED = "off", "asked"
CLAMPED, SEEN = "clamped", "any_token"


@dataclass(frozen=True, slots=True)
class Arm:
    """One condition."""

    name: str
    enforce: str | None = None
    """Id of its policy; None if nothing is clamped."""
    edit: str = ""
    latents: Mapping[int, float] | None = None
    """Of the clamp, with the weight of each in its target."""
    edit_norm: float = 0.0
    """Mean norm of the edit on the sample's tokens."""
    random: bool = False
    system: str | None = None
    """Message of the system role that its prompts get in front."""


@dataclass(frozen=True, slots=True)
class Sample:
    """Residuals on which edits are compared, and the activity of all latents there."""

    x: torch.Tensor
    """[tokens, d_in] float32, without excluded tokens."""
    usual: Usual


def clamp_arms(
    folder: Path, features: FeatureSet, feature: Feature, edits: Sequence[EditSpec], sample: Sample
) -> list[Arm]:
    """Write one arm for each edit of the feature's clamp latents."""
    found = []
    for number, edit in enumerate(edits):
        policy = _write(folder, features, f"on-{number}", feature, edit)
        weights = {t.latent: t.weight for t in feature.clamp}
        norm = edit_norm(features, feature, edit, sample.x)
        found.append(Arm(f"on, {edit}", policy, str(edit), weights, norm))
    return found


def random_arms(
    folder: Path,
    features: FeatureSet,
    clamped: Sequence[Arm],
    edits: Sequence[EditSpec],
    draws: int,
    sample: Sample,
    seed: int,
) -> list[Arm]:
    """Write `draws` arms of random latents for each of the `clamped` arms.

    Raises:
        ValueError: too few latents fire on the sample.
    """
    own = {t.latent for f in features.features.values() for t in (*f.detect, *f.clamp)}
    rng = np.random.default_rng(seed)
    drawn = [draw(sample.usual, list(clamped[0].latents or ()), own, rng) for _ in range(draws)]
    return [
        _random_arm(folder, features, arm, edit, number, latents, sample)
        for arm, edit in zip(clamped, edits, strict=True)
        for number, latents in enumerate(drawn, 1)
    ]


def _random_arm(
    folder: Path,
    features: FeatureSet,
    arm: Arm,
    edit: EditSpec,
    number: int,
    latents: tuple[int, ...],
    sample: Sample,
) -> Arm:
    name = f"random {number}, like {arm.edit}"
    if edit.how in {"to", "activation"}:
        info = sae_of(features).inspect()
        f = activate(read_rows(info, list(latents)), sample.x, info.norm)
        W_dec = read_decoder_rows(info, list(latents))
        scale = token_scale(info.norm, sample.x)
        weights = scale_to_norm(sample.usual, latents, f, W_dec, arm.edit_norm, scale)
        like = EditSpec("activation", 1.0)
    else:
        weights, like = dict.fromkeys(latents, 1.0), edit
    feature = _feature(CLAMPED, weights, 0.0, 1.0)
    if edit.how == "at_most":  # a share of the latent's own usual height
        feature = replace(feature, high=float(sample.usual.mean[list(latents)].mean()))
    at = (arm.enforce or "").rpartition("-")[2]
    policy = _write(folder, features, f"random-{at}-{number}", feature, like)
    norm = edit_norm(features, feature, like, sample.x)
    return Arm(name, policy, str(like), weights, norm, random=True)


def edit_norm(features: FeatureSet, feature: Feature, edit: EditSpec, x: torch.Tensor) -> float:
    """Return the mean norm of the edit over the residuals `x` [tokens, d_in]."""
    info = sae_of(features).inspect()
    latents = [t.latent for t in feature.clamp]
    weight = torch.tensor([t.weight for t in feature.clamp])
    f = activate(read_rows(info, latents), x, info.norm)
    share = weight * (feature.low + edit.amount * (feature.high - feature.low))
    edited = {
        "to": lambda: share.expand_as(f),
        "activation": lambda: (weight * edit.amount).expand_as(f),
        "scale": lambda: edit.amount * f,
        "ablate": lambda: torch.zeros_like(f),
        "at_most": lambda: torch.minimum(f, share),
    }[edit.how]()
    delta, scale = edited - f, token_scale(info.norm, x)
    delta = delta if scale is None else delta / scale  # in the residual's own units
    return float((delta @ read_decoder_rows(info, latents)).norm(dim=1).mean())


def sae_of(features: FeatureSet) -> SaeRef:
    """Return the SAE of a feature set that names clamp latents; such a set has one."""
    assert features.sae is not None
    return features.sae


def new_feature(latents: Mapping[int, float]) -> Feature:
    """Return a feature of latents given by hand; its range of 0 to 1 makes `to` an activation."""
    return _feature(CLAMPED, latents, 0.0, 1.0)


def _feature(name: str, weights: Mapping[int, float], low: float, high: float) -> Feature:
    terms = tuple(Term(latent, weight) for latent, weight in weights.items())
    detect = tuple(replace(t, weight=1.0) for t in terms)
    return Feature(
        id=name,
        title=name.replace("_", " "),
        behaviour="none",
        detect=detect,
        probe=None,
        clamp=terms,
        low=low,
        high=high,
        threshold=0.5,
        evidence={},
    )


def _write(folder: Path, features: FeatureSet, name: str, feature: Feature, edit: EditSpec) -> str:
    """Write one arm's policy and feature set, and return the policy's id."""
    # Its share is 1 or more at every token, so the policy matches wherever the clamp edits. An
    # output without a match then means that the clamp was not there.
    seen = _feature(SEEN, {feature.clamp[0].latent: 1.0}, -1.0, 0.0)
    known = {SEEN: replace(seen, clamp=()), CLAMPED: replace(feature, id=CLAMPED)}
    variant = replace(features, id=name, features=known, status="calibrated")
    save_feature_set(variant, folder / "feature_sets" / f"{name}.yaml")
    policy: dict[str, Any] = {
        "schema": "saeguard.policy/v1",
        "id": f"effect.{name}",
        "title": f"Clamp, {edit}",
        "owner": "saeguard features clamp-effect",
        "severity": "low",
        "mode": "shadow",
        "action": "clamp",
        "on_error": "allow",
        "scope": "both",
        "feature_set": name,
        "rationale": "One arm of a comparison of clamps.",
        "detect": {"token": {"feature": SEEN, "above": 0.5}},
        "condition": "token",
        "clamp": {"features": [CLAMPED], **edit.clamp, "when": "always"},
    }
    file = folder / "policies" / f"{name}.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump(policy, sort_keys=False), encoding="utf-8")
    return str(policy["id"])
