"""What the loaded policies compile to: encoder rows, feature columns, rules, clamps."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import numpy as np
import torch

from saeguard.errors import InputError
from saeguard.features.probe import ProbeError, read_probe
from saeguard.features.topk_thresholds import Approximation
from saeguard.features.types import Feature, FeatureSet, ModelRef, ProbeRef
from saeguard.guard.compiled_rules import Rules, RulesError, compile_rules
from saeguard.guard.topk import ROUNDING, RankedRows, screen_thresholds
from saeguard.policy.published import acts_on_published
from saeguard.policy.types import Clamp, Policy
from saeguard.sae import SaeError, read_decoder_rows, read_rows
from saeguard.sae.encoder import NORMS

ADDING = frozenset({"mean", "average"})
"""Aggregates to which a token adds however little its latents fire."""

RowKey: TypeAlias = tuple[str, int | str]
"""A watched row: feature set, and latent or probe."""


class WatchListError(InputError):
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
    norm: torch.Tensor | None = None
    """[rows] int64, indices into `NORMS`: what is done to each token first; None for nothing."""
    ranked: tuple[RankedRows, ...] = ()
    """Rows of TopK and groupmax SAEs, which fire by rank."""


@dataclass(frozen=True, slots=True)
class ClampRows:
    """What one layer's clamp policies edit: `f` becomes `min(scale * f + target, cap)`.

    The residual changes by the difference times `W_dec`, and by nothing else.
    """

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
    scale: torch.Tensor | None = None
    """[clamped] float32; None: 0."""
    cap: torch.Tensor | None = None
    """[clamped] float32; None: infinite."""

    def to(self, device: torch.device) -> ClampRows:
        """Return the same on a device."""
        moved = [None if t is None else t.to(device) for t in (self.scale, self.cap)]
        return replace(
            self,
            target=self.target.to(device),
            W_dec=self.W_dec.to(device),
            scale=moved[0],
            cap=moved[1],
        )

    def edited(self, f: torch.Tensor) -> torch.Tensor:
        """Return what becomes of the activations [tokens, clamped]."""
        out = self.target.expand_as(f) if self.scale is None else self.scale * f + self.target
        return out if self.cap is None else torch.minimum(out, self.cap)


Mix: TypeAlias = tuple[tuple[Any, Any], ...]
"""How latents make features: (column, weight) of the first latent of each feature, of the second
of each that has one, and so on; features come in the order of falling numbers of latents."""


def shares_of(mix: Mix, low: Any, span: Any, f: Any) -> Any:
    """Return feature shares [tokens, features] for watched activations `f` [tokens, columns].

    NumPy arrays or torch tensors, added up in the same order, so that both agree to the last bit.
    """
    value = None
    for column, weight in mix:
        part = f[:, column] * weight
        if value is None:
            value = part
        else:
            value[:, : len(column)] += part
    return (value - low) / span


@dataclass(frozen=True, slots=True)
class WatchList:
    """Everything the guard needs at run time, derived from the policies once."""

    policies: tuple[Policy, ...]
    hooks: tuple[Hook, ...]
    clamps: tuple[ClampRows, ...]
    features: tuple[str, ...]
    """`set/feature` of each feature column."""
    mix: Mix
    low: np.ndarray
    """[features] float32."""
    span: np.ndarray
    """[features] float32, `high - low`."""
    rules: Rules
    exclude_tokens: tuple[int, ...]
    models: tuple[ModelRef, ...]
    """The models that the feature sets hold for."""
    digest: str
    """sha256 over policies, feature sets and checkpoints: what the verdicts depend on."""
    approximations: Mapping[str, Approximation] = field(default_factory=dict)
    """By feature set: thresholds that stand for ranks."""

    @property
    def columns(self) -> int:
        """Number of watched rows over all hooks."""
        return sum(hook.W.shape[0] for hook in self.hooks)

    def shares(self, activations: np.ndarray) -> np.ndarray:
        """Return feature shares [tokens, features] for watched activations [tokens, columns]."""
        shares: np.ndarray = shares_of(self.mix, self.low, self.span, activations)
        return shares

    def latents(self, feature: int) -> tuple[tuple[int, float], ...]:
        """Return column and weight of each latent that a feature column is made of."""
        return tuple((int(c[feature]), float(w[feature])) for c, w in self.mix if feature < len(c))

    def nbytes(self) -> int:
        """Return the bytes of weights held by the watch list."""
        tensors = [t for h in self.hooks for t in (h.W, h.b, h.theta)]
        tensors += [
            t for c in self.clamps for t in (c.target, c.W_dec, c.scale, c.cap) if t is not None
        ]
        return sum(t.numel() * t.element_size() for t in tensors)


def clamps_digest(watchlist: WatchList) -> str:
    """Return a digest of all that decides where a list clamps, and what to; empty if it cannot.

    Lists with the same clamps share the state on the device, whatever else they watch.
    """
    if not watchlist.clamps:
        return ""
    digest = hashlib.sha256()
    for clamp in watchlist.clamps:
        digest.update(repr((clamp.layer, clamp.columns, clamp.owner)).encode())
        for tensor in (clamp.target, clamp.W_dec, clamp.scale, clamp.cap):
            digest.update(b"-" if tensor is None else tensor.numpy().tobytes())
        for i in clamp.policies:
            policy = watchlist.policies[i]
            digest.update(f"{policy.id} {policy.mode} {policy.digest}".encode())
            for name, selection in sorted(policy.detect.items()):
                feature = watchlist.features.index(f"{policy.feature_set}/{selection.feature}")
                scale = (float(watchlist.low[feature]), float(watchlist.span[feature]))
                digest.update(repr((name, watchlist.latents(feature), *scale)).encode())
    return digest.hexdigest()


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
        WatchListError: a feature set or feature is missing, two policies clamp one latent, the
            policies are too many, or a checkpoint does not fit.
    """
    policies = tuple(sorted(policies, key=lambda p: (p.id, p.mode)))
    _refuse_uncalibrated(policies, feature_sets, may_enforce)
    used: dict[str, tuple[FeatureSet, Feature]] = {}
    for policy in policies:
        for name in _features_of(policy):
            used[f"{policy.feature_set}/{name}"] = _lookup(policy, name, feature_sets)

    rows = dict.fromkeys(
        (_set_of(name), key) for name, (_, feature) in used.items() for key in _row_keys(feature)
    )
    by_layer: dict[int, list[RowKey]] = {}
    # The latents of one SAE side by side: where they fire by rank, they are one block of columns.
    for set_id, key in sorted(rows, key=lambda row: (row[0], isinstance(row[1], str))):
        by_layer.setdefault(feature_sets[set_id].sae.layer, []).append((set_id, key))

    hooks: list[Hook] = []
    column: dict[RowKey, int] = {}
    for layer in sorted(by_layer):
        hook = _read_hook(layer, by_layer[layer], feature_sets, policies, len(column))
        column |= {key: len(column) + i for i, key in enumerate(by_layer[layer])}
        hooks.append(hook)

    used = dict(sorted(used.items(), key=lambda item: -_latents(item[1][1])))
    low = np.array([f.low for _, f in used.values()], np.float32)
    high = np.array([f.high for _, f in used.values()], np.float32)

    sets = {policy.feature_set: feature_sets[policy.feature_set] for policy in policies}
    approximations = {
        name: s.sae.approximation for name, s in sets.items() if s.sae.approximation is not None
    }
    approximate = {
        name
        for name, (_, feature) in used.items()
        if _set_of(name) in approximations and (feature.detect or feature.clamp)
    }
    try:
        rules = compile_rules(policies, {name: i for i, name in enumerate(used)}, approximate)
    except RulesError as error:
        raise WatchListError(str(error)) from error
    return WatchList(
        policies=policies,
        hooks=tuple(hooks),
        clamps=_clamps(policies, feature_sets, hooks, column, may_enforce),
        features=tuple(used),
        mix=_mix(used, column),
        low=low,
        span=high - low,
        rules=rules,
        exclude_tokens=tuple(sorted({t for s in sets.values() for t in s.exclude_tokens})),
        models=tuple(dict.fromkeys(s.model for s in sets.values())),
        digest=_digest(
            [*(f"{p.id} {p.mode} {p.digest}" for p in policies)]
            + [f"{s.id} {s.digest} {s.sae.sha256}" for s in sets.values()]
        ),
        approximations=approximations,
    )


def _latents(feature: Feature) -> int:
    return len(feature.detect) + (feature.probe is not None)


def _refuse_uncalibrated(
    policies: Sequence[Policy],
    feature_sets: Mapping[str, FeatureSet],
    may_enforce: frozenset[str],
) -> None:
    for policy in policies:
        features = feature_sets.get(policy.feature_set)
        acting = features and acts_on_published(policy, features.status, may_enforce)
        if acting:
            raise WatchListError(acting.render())


def _mix(used: Mapping[str, tuple[FeatureSet, Feature]], column: Mapping[RowKey, int]) -> Mix:
    """Return how latents make the features, which come with those of most latents first."""
    parts: list[list[tuple[int, float]]] = []
    for name, (_, feature) in used.items():
        terms = [(column[_set_of(name), t.latent], t.weight) for t in feature.detect]
        if feature.probe is not None:
            terms.append((column[_set_of(name), _probe_key(feature.probe)], 1.0))
        parts.append(terms or [(0, 0.0)])
    most = max(map(len, parts), default=0)
    return tuple(
        (np.array([c for c, _ in row], np.intp), np.array([w for _, w in row], np.float32))
        for j in range(most)
        for row in [[terms[j] for terms in parts if len(terms) > j]]
    )


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
    policies: Sequence[Policy],
    first_column: int,
) -> Hook:
    d_in = feature_sets[keys[0][0]].sae.d_in
    W = torch.empty(len(keys), d_in)
    b = torch.empty(len(keys))
    theta = torch.full((len(keys),), -torch.inf)
    norm = torch.zeros(len(keys), dtype=torch.int64)
    ranked = []
    for set_id in dict.fromkeys(set_id for set_id, _ in keys):
        features = feature_sets[set_id]
        if features.sae.d_in != d_in:
            raise WatchListError(
                f"{features.path}: sae.d_in is {features.sae.d_in}, but another feature set "
                f"reads layer {layer} with width {d_in}"
            )
        latents = [key for s, key in keys if s == set_id and isinstance(key, int)]
        if latents:
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
                screen = _screen_thresholds(latents, set_id, features, policies)
                ranked.append(RankedRows(info, at, tuple(latents), screen))
        for feature in features.features.values():
            if feature.probe is not None and (set_id, _probe_key(feature.probe)) in keys:
                i = keys.index((set_id, _probe_key(feature.probe)))
                W[i], b[i] = _read_probe(feature.probe, d_in)
    normed = norm if norm.any() else None
    return Hook(layer, d_in, W, b, theta, first_column, normed, tuple(ranked))


def _screen_thresholds(
    latents: Sequence[int], set_id: str, features: FeatureSet, policies: Sequence[Policy]
) -> torch.Tensor:
    """Return from which activation on each latent can make some policy hold."""
    lowest = []
    exact: set[int] = set()
    for policy in policies:
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
    """Return scale, shift and cap of a latent that is `weight` of a clamped feature."""
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


def _digest(parts: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
