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
        WatchListError: two policies clamp one latent, or a feature names no clamp latents.
    """
    clamps = []
    for hook in hooks:
        owners = [
            i
            for i, p in enumerate(policies)
            if p.action == "clamp"
            and (p.mode == "enforce" or p.id in may_enforce)
            and feature_sets[p.feature_set].sae.layer == hook.layer
        ]
        target: dict[tuple[str, int], tuple[int, float, float, float]] = {}
        for local, i in enumerate(owners):
            policy = policies[i]
            features = feature_sets[policy.feature_set]
            assert policy.clamp is not None
            for name in policy.clamp.features:
                feature = features.features[name]
                if not feature.clamp:
                    raise WatchListError(
                        f"{policy.path}: clamp: feature {name!r} of {features.path} names no "
                        "clamp latents"
                    )
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
            for latent, row in zip(
                latents,
                read_decoder_rows(feature_sets[set_id].sae.inspect(), latents),
                strict=True,
            )
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
