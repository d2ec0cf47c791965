"""What the loaded policies compile to: encoder rows, feature columns, selections, windows."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch

from saeguard.features.probe import ProbeError, read_probe
from saeguard.features.types import Feature, FeatureSet, ModelRef, ProbeRef
from saeguard.guard.evidence import evidence
from saeguard.policy.types import Policy
from saeguard.sae import SaeError, inspect, read_decoder_rows, read_rows

RowKey: TypeAlias = tuple[str, int | str]
"""A watched row: feature set, and latent or probe."""


class WatchListError(ValueError):
    """The policies, feature sets and checkpoints do not fit together."""


@dataclass(frozen=True, slots=True)
class Hook:
    """The watched encoder rows of one layer."""

    layer: int
    d_in: int
    W: torch.Tensor
    """[rows, d_in] float32, one contiguous row per watched latent or probe."""
    b: torch.Tensor
    """[rows] float32."""
    theta: torch.Tensor
    """[rows] float32: `f = pre * (pre > theta)`; -inf for probes, which have no activation."""
    first_column: int
    """Where this hook's rows start among the columns of the activations."""


@dataclass(frozen=True, slots=True)
class ClampRows:
    """The decoder rows that one layer's clamp policies write, `delta = (target - f) @ W_dec`."""

    layer: int
    policies: tuple[int, ...]
    """Indices into `WatchList.policies`."""
    columns: tuple[int, ...]
    """Per clamped latent: its column within the hook's rows."""
    owner: tuple[int, ...]
    """Per clamped latent: which of `policies` clamps it."""
    target: torch.Tensor
    """[clamped] float32."""
    W_dec: torch.Tensor
    """[clamped, d_in] float32."""


@dataclass(frozen=True, slots=True)
class WatchList:
    """Everything the guard needs at run time, derived from the policies once."""

    policies: tuple[Policy, ...]
    hooks: tuple[Hook, ...]
    clamps: tuple[ClampRows, ...]
    features: tuple[str, ...]
    """`set/feature` of each feature column."""
    mix: np.ndarray
    """[columns, features] float32: shares of the latents in each feature."""
    low: np.ndarray
    """[features] float32."""
    span: np.ndarray
    """[features] float32, `high - low`."""
    selection_feature: np.ndarray
    """[selections] feature column of each distinct selection."""
    selection_above: np.ndarray
    """[selections] float64."""
    policy_selections: tuple[Mapping[str, int], ...]
    """Per policy: name of a selection -> its index among the distinct ones."""
    exclude_tokens: tuple[int, ...]
    models: tuple[ModelRef, ...]
    """The models that the feature sets hold for."""
    digest: str
    """sha256 over policies, feature sets and checkpoints: what the verdicts depend on."""

    @property
    def columns(self) -> int:
        """Number of watched rows over all hooks."""
        return sum(hook.W.shape[0] for hook in self.hooks)

    def shares(self, activations: np.ndarray) -> np.ndarray:
        """Return feature shares [tokens, features] for watched activations [tokens, columns]."""
        shares: np.ndarray = (activations @ self.mix - self.low) / self.span
        return shares

    def evidence(self, shares: np.ndarray) -> np.ndarray:
        """Return evidence [tokens, policies] float64 for shares [tokens, features]."""
        ratio = shares[:, self.selection_feature].astype(np.float64) / self.selection_above
        out = np.empty((shares.shape[0], len(self.policies)), np.float64)
        for i, (policy, names) in enumerate(
            zip(self.policies, self.policy_selections, strict=True)
        ):
            columns = {name: ratio[:, j] for name, j in names.items()}
            out[:, i] = evidence(policy.condition, columns, np)
        return out

    def nbytes(self) -> int:
        """Return the bytes of weights held by the watch list."""
        tensors = [t for h in self.hooks for t in (h.W, h.b, h.theta)]
        tensors += [t for c in self.clamps for t in (c.target, c.W_dec)]
        return sum(t.numel() * t.element_size() for t in tensors)


def build_watchlist(
    policies: Sequence[Policy],
    feature_sets: Mapping[str, FeatureSet],
    *,
    may_enforce: frozenset[str] = frozenset(),
) -> WatchList:
    """Compile `policies` over `feature_sets` (by name) and read the encoder rows they need.

    Args:
        policies: in any order.
        feature_sets: by the name that policies use.
        may_enforce: ids of shadow policies that a request may have enforced; only these and the
            enforced ones can ever clamp, so only theirs cost anything inside the forward.

    Raises:
        WatchListError: a feature set or feature is missing, an action is not supported, two
            policies clamp one latent to different values, or a checkpoint does not fit.
    """
    policies = tuple(sorted(policies, key=lambda p: (p.id, p.mode)))
    used: dict[str, tuple[FeatureSet, Feature]] = {}
    for policy in policies:
        for name in _features_of(policy):
            used[f"{policy.feature_set}/{name}"] = _lookup(policy, name, feature_sets)

    rows = dict.fromkeys(
        (_set_of(name), key) for name, (_, feature) in used.items() for key in _row_keys(feature)
    )
    by_layer: dict[int, list[RowKey]] = {}
    for set_id, key in rows:
        by_layer.setdefault(feature_sets[set_id].sae.layer, []).append((set_id, key))

    hooks: list[Hook] = []
    column: dict[RowKey, int] = {}
    for layer in sorted(by_layer):
        hook = _read_hook(layer, by_layer[layer], feature_sets, first_column=len(column))
        column |= {key: len(column) + i for i, key in enumerate(by_layer[layer])}
        hooks.append(hook)

    names = tuple(used)
    low = np.array([f.low for _, f in used.values()], np.float32)
    high = np.array([f.high for _, f in used.values()], np.float32)

    selections: dict[tuple[int, float], int] = {}
    policy_selections = tuple(
        {
            name: selections.setdefault(
                (names.index(f"{policy.feature_set}/{s.feature}"), s.above), len(selections)
            )
            for name, s in policy.detect.items()
        }
        for policy in policies
    )
    sets = {policy.feature_set: feature_sets[policy.feature_set] for policy in policies}
    return WatchList(
        policies=policies,
        hooks=tuple(hooks),
        clamps=_clamps(policies, feature_sets, hooks, column, may_enforce),
        features=names,
        mix=_mix(used, column),
        low=low,
        span=high - low,
        selection_feature=np.array([f for f, _ in selections], np.intp),
        selection_above=np.array([above for _, above in selections], np.float64),
        policy_selections=policy_selections,
        exclude_tokens=tuple(sorted({t for s in sets.values() for t in s.exclude_tokens})),
        models=tuple(dict.fromkeys(s.model for s in sets.values())),
        digest=_digest(
            [*(f"{p.id} {p.mode} {p.digest}" for p in policies)]
            + [f"{s.id} {s.digest} {s.sae.sha256}" for s in sets.values()]
        ),
    )


def _mix(
    used: Mapping[str, tuple[FeatureSet, Feature]], column: Mapping[RowKey, int]
) -> np.ndarray:
    mix = np.zeros((len(column), len(used)), np.float32)
    for j, (name, (_, feature)) in enumerate(used.items()):
        if feature.probe is not None:
            mix[column[_set_of(name), _probe_key(feature.probe)], j] = 1.0
        for term in feature.detect:
            mix[column[_set_of(name), term.latent], j] = term.weight
    return mix


def _features_of(policy: Policy) -> list[str]:
    clamped = policy.clamp.features if policy.clamp else ()
    return [*(s.feature for s in policy.detect.values()), *clamped]


def _lookup(
    policy: Policy, name: str, feature_sets: Mapping[str, FeatureSet]
) -> tuple[FeatureSet, Feature]:
    features = feature_sets.get(policy.feature_set)
    if features is None:
        known = ", ".join(sorted(feature_sets)) or "none is loaded"
        raise WatchListError(
            f"{policy.path}: feature_set {policy.feature_set!r} is not loaded; known: {known}"
        )
    feature = features.features.get(name)
    if feature is None:
        known = ", ".join(sorted(features.features))
        raise WatchListError(
            f"{policy.path}: feature {name!r} is not in {features.path}; known: {known}"
        )
    return features, feature


def _set_of(name: str) -> str:
    return name.rsplit("/", 1)[0]


def _probe_key(probe: ProbeRef) -> str:
    return f"{probe.path}#{probe.name}"


def _row_keys(feature: Feature) -> Iterable[int | str]:
    if feature.probe is not None:
        yield _probe_key(feature.probe)
    yield from (t.latent for t in (*feature.detect, *feature.clamp))


def _read_hook(
    layer: int,
    keys: Sequence[RowKey],
    feature_sets: Mapping[str, FeatureSet],
    *,
    first_column: int,
) -> Hook:
    d_in = feature_sets[keys[0][0]].sae.d_in
    W = torch.empty(len(keys), d_in)
    b = torch.empty(len(keys))
    theta = torch.full((len(keys),), -torch.inf)
    for set_id in dict.fromkeys(set_id for set_id, _ in keys):
        features = feature_sets[set_id]
        if features.sae.d_in != d_in:
            raise WatchListError(
                f"{features.path}: sae.d_in is {features.sae.d_in}, but another feature set "
                f"reads layer {layer} with width {d_in}"
            )
        at = [i for i, (s, key) in enumerate(keys) if s == set_id and isinstance(key, int)]
        latents = [key for s, key in keys if s == set_id and isinstance(key, int)]
        if latents:
            try:
                read = read_rows(inspect(features.sae.path), latents)
            except SaeError as error:
                raise WatchListError(f"{features.path}: {error}") from error
            W[at], b[at], theta[at] = read.W, read.b, read.theta
        for feature in features.features.values():
            if feature.probe is not None and (set_id, _probe_key(feature.probe)) in keys:
                i = keys.index((set_id, _probe_key(feature.probe)))
                W[i], b[i] = _read_probe(feature.probe, d_in)
    return Hook(layer, d_in, W, b, theta, first_column)


def _read_probe(probe: ProbeRef, d_in: int) -> tuple[torch.Tensor, torch.Tensor]:
    try:
        read = read_probe(probe, d_in)
    except ProbeError as error:
        raise WatchListError(str(error)) from error
    return torch.from_numpy(read.w), torch.tensor(read.b)


def _clamps(
    policies: Sequence[Policy],
    feature_sets: Mapping[str, FeatureSet],
    hooks: Sequence[Hook],
    column: Mapping[RowKey, int],
    may_enforce: frozenset[str],
) -> tuple[ClampRows, ...]:
    clamps = []
    for hook in hooks:
        owners = [
            i
            for i, p in enumerate(policies)
            if p.action == "clamp"
            and (p.mode == "enforce" or p.id in may_enforce)
            and feature_sets[p.feature_set].sae.layer == hook.layer
        ]
        target: dict[tuple[str, int], tuple[int, float]] = {}
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
                value = feature.low + policy.clamp.to * (feature.high - feature.low)
                for term in feature.clamp:
                    key = (policy.feature_set, term.latent)
                    wanted = (local, term.weight * value)
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
                read_decoder_rows(inspect(feature_sets[set_id].sae.path), latents),
                strict=True,
            )
        }
        clamps.append(
            ClampRows(
                layer=hook.layer,
                policies=tuple(owners),
                columns=tuple(column[key] - hook.first_column for key in target),
                owner=tuple(local for local, _ in target.values()),
                target=torch.tensor([value for _, value in target.values()]),
                W_dec=torch.stack([decoder[key] for key in target]),
            )
        )
    return tuple(clamps)


def _digest(parts: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
