"""Read the encoder rows that the policies need, one hook per layer."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeAlias

import torch

from saeguard.features.probe import ProbeError, read_probe
from saeguard.features.types import Feature, FeatureSet, ProbeRef
from saeguard.guard.topk import RankedRows
from saeguard.guard.watchlist import Hook, WatchListError
from saeguard.policy.types import Policy
from saeguard.sae import SaeError, read_rows
from saeguard.sae.encoder import NORMS

ADDING = frozenset({"mean", "average", "whole"})
"""Aggregates that any activation changes, however small it is."""
ROUNDING = 1e-5
"""Relative distance of a screen threshold below its exact value, since the rules round."""

RowKey: TypeAlias = tuple[str, int | str]
"""Identifies an encoder row: its feature set, and its latent or probe and layer."""


def read_hooks(
    used: Mapping[str, tuple[FeatureSet, Feature]],
    feature_sets: Mapping[str, FeatureSet],
    policies: Sequence[Policy] | None,
) -> tuple[tuple[Hook, ...], dict[RowKey, int]]:
    """Return one hook per layer, and the column of each encoder row, counted over all hooks.

    Args:
        used: by `feature_set/feature`, the features that the policies read or clamp.
        feature_sets: by the name that policies use.
        policies: all of them; None if every activation matters, whatever policies there are.

    Raises:
        WatchListError: a checkpoint or probe cannot be read, or has another width.
    """
    rows = {
        (name.rsplit("/", 1)[0], key): layer
        for name, (features, feature) in used.items()
        for key, layer in _row_keys(features, feature)
    }
    by_layer: dict[int, list[RowKey]] = {}
    # The latents of one SAE stand side by side: latents that fire by rank are one block of columns.
    for row in sorted(rows, key=lambda row: (row[0], isinstance(row[1], str))):
        by_layer.setdefault(rows[row], []).append(row)
    hooks: list[Hook] = []
    column: dict[RowKey, int] = {}
    for layer in sorted(by_layer):
        first = hooks[-1].norm_column + 1 if hooks else 0
        hooks.append(_read_hook(layer, by_layer[layer], feature_sets, policies, first))
        column |= {key: first + i for i, key in enumerate(by_layer[layer])}
    return tuple(hooks), column


def probe_keys(probe: ProbeRef) -> tuple[str, ...]:
    """Return the names of a probe's encoder rows, one for each of its layers.

    The shape of a probe's weights belongs to the name: with other layers the rows are others.
    """
    return tuple(f"{probe.path}#{probe.name}@{layer} of {probe.layers}" for layer in probe.layers)


def _row_keys(features: FeatureSet, feature: Feature) -> Iterable[tuple[int | str, int]]:
    """Yield the key of each encoder row of a feature, and its layer."""
    if feature.probe is not None:
        yield from zip(probe_keys(feature.probe), feature.probe.layers, strict=True)
    latents = [t.latent for t in (*feature.detect, *feature.clamp)]
    if features.sae is None and latents:
        raise WatchListError(
            f"{features.path}: feature {feature.id!r} names latents, but the set has no SAE"
        )
    if features.sae is not None:
        yield from ((latent, features.sae.layer) for latent in latents)


def _read_hook(
    layer: int,
    keys: Sequence[RowKey],
    feature_sets: Mapping[str, FeatureSet],
    policies: Sequence[Policy] | None,
    first_column: int,
) -> Hook:
    d_in = feature_sets[keys[0][0]].model.hidden_size
    W = torch.empty(len(keys), d_in)
    b = torch.empty(len(keys))
    theta = torch.full((len(keys),), -torch.inf)
    norm = torch.zeros(len(keys), dtype=torch.int64)
    ranked = []
    for set_id in dict.fromkeys(set_id for set_id, _ in keys):
        features = feature_sets[set_id]
        if features.model.hidden_size != d_in:
            raise WatchListError(
                f"{features.path}: model.hidden_size is {features.model.hidden_size}, but another "
                f"feature set reads layer {layer} with width {d_in}"
            )
        latents = [key for s, key in keys if s == set_id and isinstance(key, int)]
        if latents:
            assert features.sae is not None
            first = keys.index((set_id, latents[0]))
            at = slice(first, first + len(latents))
            try:
                info = features.sae.inspect()
                read = read_rows(info, latents)
            except SaeError as error:
                raise WatchListError(f"{features.path}: {error}") from error
            W[at], b[at], theta[at] = read.W, read.b, read.theta
            norm[at] = NORMS.index(info.norm)
            if info.k is not None:
                screen = _screens(latents, set_id, features, policies)
                ranked.append(RankedRows(info, at, tuple(latents), screen))
        for probe in dict.fromkeys(f.probe for f in features.features.values() if f.probe):
            for part, key in enumerate(probe_keys(probe)):
                if probe.layers[part] == layer and (set_id, key) in keys:
                    i = keys.index((set_id, key))
                    W[i], b[i] = _read_probe(probe, part, d_in)
    normed = norm if norm.any() else None
    sets = dict.fromkeys(set_id for set_id, _ in keys)
    max_norm = min(feature_sets[set_id].max_norm.get(layer, math.inf) for set_id in sets)
    return Hook(layer, d_in, W, b, theta, first_column, normed, tuple(ranked), max_norm)


def _read_probe(probe: ProbeRef, part: int, d_in: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the encoder row and bias of one of a probe's layers."""
    try:
        read = read_probe(probe, d_in)
    except ProbeError as error:
        raise WatchListError(str(error)) from error
    return torch.from_numpy(read.w[part]), torch.tensor(read.biases[part])


def _screens(
    latents: Sequence[int], set_id: str, features: FeatureSet, policies: Sequence[Policy] | None
) -> torch.Tensor:
    """Return the screen threshold of each latent of a feature set, [latents] float32."""
    lowest = []
    exact: set[int] = set(latents if policies is None else ())
    for policy in policies or ():
        if policy.feature_set == set_id:
            for selection in policy.detect.values():
                feature = features.features[selection.feature]
                if selection.over.kind in ADDING:
                    exact |= {term.latent for term in feature.detect}
                rise = selection.above * (feature.high - feature.low)
                slack = ROUNDING * (abs(feature.low) + abs(rise))
                lowest.append((feature, feature.low + rise - slack))
            for name in policy.clamp.features if policy.clamp else ():
                exact |= {term.latent for term in features.features[name].clamp}
    return screen_thresholds(latents, lowest, frozenset(exact))


def screen_thresholds(
    latents: Iterable[int],
    lowest: Iterable[tuple[Feature, float]],
    exact: frozenset[int] = frozenset(),
) -> torch.Tensor:
    """Return the screen threshold of each latent, [latents] float32.

    A feature's value `sum(weight * f)` exceeds `v` only if one of its `n` positive terms exceeds
    `v / n`. The ranking can only set activations to 0, so no positive term grows.

    Args:
        latents: the watched latents.
        lowest: features with the lowest value that any policy compares them with.
        exact: latents that need every activation: a clamp subtracts it, or a mean adds it up.
    """
    out = dict.fromkeys(latents, torch.inf)
    for feature, value in lowest:
        # A selection with a negative value holds while nothing fires, so any latent matters.
        positive = [
            term for term in feature.detect if term.weight > 0 or (value < 0 and term.weight)
        ]
        for term in positive:
            share = value / (len(positive) * abs(term.weight))
            screen = max(share, 0.0) * (1 - ROUNDING)
            out[term.latent] = min(out[term.latent], screen)
    return torch.tensor([0.0 if n in exact else screen for n, screen in out.items()])
