"""Compile policies and feature sets to a watch list, and read the encoder rows that it needs."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from saeguard.features.massive import left_out
from saeguard.features.topk_thresholds import Approximation
from saeguard.features.types import Feature, FeatureSet, ModelRef
from saeguard.features.value import Mix, make_mix
from saeguard.guard.build_hooks import RowKey, probe_keys, read_hooks
from saeguard.guard.clamp.build import build_clamps
from saeguard.guard.compiled_rules import Rules, RulesError, compile_rules
from saeguard.guard.watchlist import WatchList, WatchListError
from saeguard.policy.published import acts_on_published
from saeguard.policy.types import Policy

Used = Mapping[str, tuple[FeatureSet, Feature]]
"""By `feature_set/feature`: the features that the policies read or clamp."""


def build_watchlist(
    policies: Sequence[Policy],
    feature_sets: Mapping[str, FeatureSet],
    *,
    may_enforce: frozenset[str] = frozenset(),
) -> WatchList:
    """Return the watch list of `policies` over `feature_sets`.

    Args:
        policies: in any order.
        feature_sets: by the name that policies use.
        may_enforce: ids of shadow policies that a request may have enforced. Only these policies
            and the enforced ones can clamp, so only their clamps are computed in the forward pass.

    Raises:
        WatchListError: a feature set or feature is missing, two policies clamp one latent, the
            policies are too many, or a checkpoint does not fit.
    """
    policies = tuple(sorted(policies, key=lambda p: (p.id, p.mode)))
    _refuse_unmeasured(policies, feature_sets, may_enforce)
    found: dict[str, tuple[FeatureSet, Feature]] = {}
    for policy in policies:
        for name in _features_of(policy):
            found[f"{policy.feature_set}/{name}"] = _lookup(
                policy.path, policy.feature_set, name, feature_sets
            )
    hooks, column = read_hooks(found, feature_sets, policies)

    used = dict(sorted(found.items(), key=lambda item: -_rows(item[1][1])))
    low = np.array([f.low for _, f in used.values()], np.float32)
    high = np.array([f.high for _, f in used.values()], np.float32)
    sets = {policy.feature_set: feature_sets[policy.feature_set] for policy in policies}
    saes = {name: s.sae for name, s in sets.items() if s.sae is not None}
    approximations = {
        name: sae.approximation for name, sae in saes.items() if sae.approximation is not None
    }
    return WatchList(
        policies=policies,
        hooks=hooks,
        clamps=build_clamps(policies, feature_sets, hooks, column, may_enforce),
        features=tuple(used),
        mix=_mix(used, column),
        low=low,
        span=high - low,
        rules=_rules(policies, used, approximations, (np.float32(0) - low) / (high - low)),
        exclude_tokens=_excluded(sets.values()),
        models=_models(sets.values()),
        digest=_digest(
            [*(f"{p.id} {p.mode} {p.digest}" for p in policies), *_contents(sets.values())]
        ),
        approximations=approximations,
        sinks=_sinks(sets, [hook.layer for hook in hooks]),
        feature_sets={name: features.digest for name, features in sets.items()},
    )


def build_readings(names: Iterable[str], feature_sets: Mapping[str, FeatureSet]) -> WatchList:
    """Return a watch list without policies, whose shares are the features' values.

    Args:
        names: `feature_set/feature` of each.
        feature_sets: by name.

    Raises:
        WatchListError: a feature set or feature is missing, or a checkpoint does not fit.
    """
    found: dict[str, tuple[FeatureSet, Feature]] = {}
    for name in dict.fromkeys(names):
        set_id, _, feature_id = name.rpartition("/")
        features, feature = _lookup("features to read", set_id, feature_id, feature_sets)
        found[name] = features, replace(feature, clamp=())
    hooks, column = read_hooks(found, feature_sets, None)
    used = dict(sorted(found.items(), key=lambda item: -_rows(item[1][1])))
    sets = {name: feature_sets[name] for name in dict.fromkeys(n.rpartition("/")[0] for n in used)}
    return WatchList(
        policies=(),
        hooks=hooks,
        clamps=(),
        features=tuple(used),
        mix=_mix(used, column),
        low=np.zeros(len(used), np.float32),
        span=np.ones(len(used), np.float32),
        rules=_rules((), used, {}, np.zeros(len(used))),
        exclude_tokens=_excluded(sets.values()),
        models=_models(sets.values()),
        digest=_digest([*used, *_contents(sets.values())]),
        sinks=_sinks(sets, [hook.layer for hook in hooks]),
    )


def _excluded(sets: Iterable[FeatureSet]) -> tuple[int, ...]:
    return tuple(sorted({token for features in sets for token in features.exclude_tokens}))


def _models(sets: Iterable[FeatureSet]) -> tuple[ModelRef, ...]:
    return tuple(dict.fromkeys(features.model for features in sets))


def _contents(sets: Iterable[FeatureSet]) -> list[str]:
    return [f"{s.id} {s.digest} {_checkpoint(s)}" for s in sets]


def _checkpoint(features: FeatureSet) -> str:
    """Return the digests of weights and configuration that are read, pinned or not."""
    if features.sae is None:
        return ""
    return f"{features.sae.sha256} {features.sae.inspect().config_sha256}"


def _sinks(sets: Mapping[str, FeatureSet], layers: Sequence[int]) -> dict[str, str]:
    return {
        f"{name}, layer {n}": left_out(features.max_norm.get(n), features.norms.get(n))
        for name, features in sets.items()
        for n in features.layers
        if n in layers
    }


def _rows(feature: Feature) -> int:
    """Return the number of encoder rows that a feature adds up."""
    return len(feature.detect) + (0 if feature.probe is None else len(feature.probe.layers))


def _refuse_unmeasured(
    policies: Sequence[Policy],
    feature_sets: Mapping[str, FeatureSet],
    may_enforce: frozenset[str],
) -> None:
    for policy in policies:
        features = feature_sets.get(policy.feature_set)
        acting = features and acts_on_published(policy, features.status, may_enforce)
        if acting:
            raise WatchListError(acting.render())


def _features_of(policy: Policy) -> list[str]:
    clamped = policy.clamp.features if policy.clamp else ()
    return [*(s.feature for s in policy.detect.values()), *clamped]


def _lookup(
    asker: object, set_id: str, name: str, feature_sets: Mapping[str, FeatureSet]
) -> tuple[FeatureSet, Feature]:
    features = feature_sets.get(set_id)
    if features is None:
        known = ", ".join(sorted(feature_sets)) or "none is loaded"
        raise WatchListError(f"{asker}: feature_set {set_id!r} is not loaded; known: {known}")
    feature = features.features.get(name)
    if feature is None:
        known = ", ".join(sorted(features.features))
        raise WatchListError(f"{asker}: feature {name!r} is not in {features.path}; known: {known}")
    return features, feature


def _rules(
    policies: Sequence[Policy],
    used: Used,
    approximations: Mapping[str, Approximation],
    rest: np.ndarray,
) -> Rules:
    approximate = {
        name
        for name, (_, feature) in used.items()
        if name.rsplit("/", 1)[0] in approximations and (feature.detect or feature.clamp)
    }
    try:
        return compile_rules(policies, {name: i for i, name in enumerate(used)}, approximate, rest)
    except RulesError as error:
        raise WatchListError(str(error)) from error


def _mix(used: Used, column: Mapping[RowKey, int]) -> Mix:
    """Return the columns and weights that add up to each feature."""
    parts: list[list[tuple[int, float]]] = []
    for name, (_, feature) in used.items():
        set_id = name.rsplit("/", 1)[0]
        terms = [(column[set_id, t.latent], t.weight) for t in feature.detect]
        if feature.probe is not None:
            terms += [(column[set_id, key], 1.0) for key in probe_keys(feature.probe)]
        parts.append(terms or [(0, 0.0)])
    return make_mix(parts)


def _digest(parts: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
