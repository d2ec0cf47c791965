"""Compile each layer's clamp policies to the latents that they edit, and to how."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from saeguard.features.types import Feature, FeatureSet
from saeguard.guard.build_hooks import RowKey
from saeguard.guard.watchlist import ClampRows, Hook, WatchListError
from saeguard.policy.types import Clamp, Policy
from saeguard.sae import read_decoder_rows


def build_clamps(
    policies: Sequence[Policy],
    feature_sets: Mapping[str, FeatureSet],
    hooks: Sequence[Hook],
    column: Mapping[RowKey, int],
    may_enforce: frozenset[str],
) -> tuple[ClampRows, ...]:
    """Return the latents that each layer's clamp policies edit.

    Args:
        policies: in the watch list's order.
        feature_sets: by the name that policies use.
        hooks: the encoder rows of each layer.
        column: of each encoder row, counted over all hooks.
        may_enforce: ids of shadow policies that a request may have enforced.

    Raises:
        WatchListError: two policies clamp one latent, a feature names no clamp latents, or a clamp
            depends on another layer than that of its SAE.
    """
    clamps = []
    layers = {
        i: _layer(policy, feature_sets[policy.feature_set])
        for i, policy in enumerate(policies)
        if policy.action == "clamp" and (policy.mode == "enforce" or policy.id in may_enforce)
    }
    for hook in hooks:
        owners = [i for i, layer in layers.items() if layer == hook.layer]
        target: dict[tuple[str, int], tuple[int, float, float, float]] = {}
        for local, i in enumerate(owners):
            policy = policies[i]
            features = feature_sets[policy.feature_set]
            assert policy.clamp is not None
            for name in policy.clamp.features:
                feature = features.features[name]
                for term in feature.clamp:
                    key = (policy.feature_set, term.latent)
                    wanted = (local, *_edit(policy, policy.clamp, feature, term.weight))
                    if target.setdefault(key, wanted) != wanted:
                        raise WatchListError(
                            f"{policy.path}: clamp: latent {term.latent} of {features.id} is "
                            "clamped already by another policy or feature; a latent can have "
                            "one clamp"
                        )
        if not target:
            continue
        sets = dict.fromkeys(set_id for set_id, _ in target)
        decoder = {
            (set_id, latent): row
            for set_id in sets
            for latents in [[x for s, x in target if s == set_id]]
            for sae in [feature_sets[set_id].sae]
            if sae is not None
            for latent, row in zip(latents, read_decoder_rows(sae.inspect(), latents), strict=True)
        }
        clamps.append(
            ClampRows(
                layer=hook.layer,
                policies=tuple(owners),
                columns=tuple(column[key] - hook.first_column for key in target),
                owner=tuple(local for local, *_ in target.values()),
                target=torch.tensor([shift for _, _, shift, _ in target.values()]),
                W_dec=torch.stack([decoder[key] for key in target]),
                scale=torch.tensor([scale for _, scale, _, _ in target.values()]),
                cap=torch.tensor([cap for *_, cap in target.values()]),
            )
        )
    return tuple(clamps)


def _layer(policy: Policy, features: FeatureSet) -> int:
    """Return the layer that a policy clamps.

    The rules of a clamp run where it edits, on what that layer's tap has just read.
    """
    assert policy.clamp is not None
    for name in policy.clamp.features:
        if features.sae is None or not features.features[name].clamp:
            raise WatchListError(
                f"{policy.path}: clamp: feature {name!r} of {features.path} names no clamp "
                "latents; a probe detects only, so use another action or another feature"
            )
    assert features.sae is not None
    for selection in policy.detect.values():
        read = features.layers_of(features.features[selection.feature])
        if read != (features.sae.layer,):
            raise WatchListError(
                f"{policy.path}: detect: feature {selection.feature!r} of {features.path} reads "
                f"layer {', '.join(map(str, read))}, but the clamp edits layer "
                f"{features.sae.layer} and sees nothing else; detect by features of that layer, "
                "or use another action"
            )
    return features.sae.layer


def _edit(
    policy: Policy, clamp: Clamp, feature: Feature, weight: float
) -> tuple[float, float, float]:
    """Return scale, shift and cap of the edit of a latent with this weight in its feature."""
    share = weight * (feature.low + clamp.amount * (feature.high - feature.low))
    if clamp.how == "at_most" and weight < 0:
        raise WatchListError(
            f"{policy.path}: clamp: at_most would raise a latent of {feature.id!r} whose weight "
            "is negative; use another edit, or leave that latent out of the feature's clamp"
        )
    edits = {
        "to": (0.0, share, math.inf),
        "activation": (0.0, weight * clamp.amount, math.inf),
        "scale": (clamp.amount, 0.0, math.inf),
        "ablate": (0.0, 0.0, math.inf),
        "at_most": (1.0, 0.0, share),
    }
    return edits[clamp.how]
