"""The watch list: what the loaded policies compile to; see `build_watchlist`."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch

from saeguard.errors import InputError
from saeguard.features.topk_thresholds import Approximation
from saeguard.features.types import ModelRef
from saeguard.features.value import Mix, shares_of
from saeguard.guard.compiled_rules import Rules
from saeguard.guard.topk import RankedRows
from saeguard.policy.types import Policy


class WatchListError(InputError):
    """The policies, feature sets and checkpoints do not fit together."""


@dataclass(frozen=True, slots=True)
class Hook:
    """The watched encoder rows of one layer."""

    layer: int
    d_in: int
    W: torch.Tensor
    """[encoder rows, d_in] float32, one contiguous row per watched latent or probe."""
    b: torch.Tensor
    """[encoder rows] float32."""
    theta: torch.Tensor
    """[encoder rows] float32: `f = z * (z > theta)`; -inf for probes, which have no threshold."""
    first_column: int
    """The first of this hook's columns among those of all hooks."""
    norm: torch.Tensor | None = None
    """[encoder rows] int64, indices into `NORMS`: how the SAE normalises each token; None if no SAE
    does."""
    ranked: tuple[RankedRows, ...] = ()
    """The encoder rows of TopK and groupmax SAEs, whose latents fire by rank."""
    max_norm: float = math.inf
    """Tokens whose residual has a larger norm are left out: see `saeguard.features.massive`."""

    @property
    def norm_column(self) -> int:
        """Return the column of the residual's norm, which follows those of the encoder rows."""
        return self.first_column + self.W.shape[0]


@dataclass(frozen=True, slots=True)
class ClampRows:
    """The latents that one layer's clamp policies edit: `f` becomes `min(scale * f + target, cap)`.

    The residual changes by the change of `f` times `W_dec`, and by nothing else.
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
    """[clamped] float32; None for 0."""
    cap: torch.Tensor | None = None
    """[clamped] float32; None for infinity."""

    def to(self, device: torch.device) -> ClampRows:
        """Return a copy on `device`."""
        moved = [None if t is None else t.to(device) for t in (self.scale, self.cap)]
        return replace(
            self,
            target=self.target.to(device),
            W_dec=self.W_dec.to(device),
            scale=moved[0],
            cap=moved[1],
        )

    def edited(self, f: Any) -> Any:
        """Return the edited activations [tokens, clamped] for the activations `f`.

        Takes tensors, and arrays if it holds arrays.
        """
        xp = np if isinstance(f, np.ndarray) else torch
        out = self.target if self.scale is None else self.scale * f + self.target
        out = out if self.cap is None else xp.minimum(out, self.cap)
        return xp.broadcast_to(out, f.shape)


class ReadRows(NamedTuple):
    """What the rules need of the rows of a forward pass."""

    shares: np.ndarray
    """[rows, features] float32."""
    finite: np.ndarray
    """[rows] bool: the row could be read."""
    massive: np.ndarray
    """[rows] bool: the row is an attention sink."""


@dataclass(frozen=True, slots=True)
class WatchList:
    """Everything that the guard needs at run time, compiled once from policies and feature sets."""

    policies: tuple[Policy, ...]
    hooks: tuple[Hook, ...]
    clamps: tuple[ClampRows, ...]
    features: tuple[str, ...]
    """`feature_set/feature` of each feature column."""
    mix: Mix
    low: np.ndarray
    """[features] float32."""
    span: np.ndarray
    """[features] float32, `high - low`."""
    rules: Rules
    exclude_tokens: tuple[int, ...]
    models: tuple[ModelRef, ...]
    """The models that the feature sets were made for."""
    digest: str
    """sha256 of policies, feature sets and checkpoints: of everything that verdicts depend on."""
    approximations: Mapping[str, Approximation] = field(default_factory=dict)
    """By feature set: the fixed thresholds that replace ranks."""
    sinks: Mapping[str, str] = field(default_factory=dict)
    """By `feature_set, layer N`: which tokens its bound on the norm leaves out, in words."""
    feature_sets: Mapping[str, str] = field(default_factory=dict)
    """Digest of each feature set's content, by name."""

    @property
    def columns(self) -> int:
        """Return the columns of a forward pass: of each hook its encoder rows, then the norm."""
        return sum(hook.W.shape[0] + 1 for hook in self.hooks)

    @property
    def encoder_rows(self) -> int:
        """Return the number of encoder rows of all hooks."""
        return sum(hook.W.shape[0] for hook in self.hooks)

    def massive(self, activations: np.ndarray) -> np.ndarray:
        """Return [tokens] bool: the residual's norm at some layer lies above its bound.

        Where a norm is not finite, no activation is, and the token is an error instead.
        """
        out = np.zeros(len(activations), bool)
        for hook in self.hooks:
            if hook.max_norm < math.inf:
                out |= activations[:, hook.norm_column] > hook.max_norm
        return out

    def read(self, activations: np.ndarray, *, ran: bool = True) -> ReadRows:
        """Return what the rules need of the rows of a forward pass.

        Args:
            activations: [rows, columns].
            ran: whether the taps ran; if not, no row could be read.
        """
        with np.errstate(invalid="ignore", over="ignore"):  # rows that are not finite are marked
            shares, massive = self.shares(activations), self.massive(activations)
        finite = np.isfinite(activations).all(axis=1) if ran else np.zeros(len(shares), bool)
        return ReadRows(shares, finite, massive)

    def shares(self, activations: np.ndarray) -> np.ndarray:
        """Return feature shares [tokens, features] for activations [tokens, columns]."""
        shares: np.ndarray = shares_of(self.mix, self.low, self.span, activations)
        return shares

    def latents(self, feature: int) -> tuple[tuple[int, float], ...]:
        """Return the column and weight of each latent of a feature."""
        return tuple((int(c[feature]), float(w[feature])) for c, w in self.mix if feature < len(c))

    def nbytes(self) -> int:
        """Return the bytes that the weights take."""
        tensors = [t for h in self.hooks for t in (h.W, h.b, h.theta)]
        tensors += [
            t for c in self.clamps for t in (c.target, c.W_dec, c.scale, c.cap) if t is not None
        ]
        return sum(t.numel() * t.element_size() for t in tensors)


def clamps_digest(watchlist: WatchList) -> str:
    """Return a digest of everything that decides the clamps' edits; empty if there are no clamps.

    Watch lists with equal clamps share the clamp state on the device, whatever else they watch.
    """
    if not watchlist.clamps:
        return ""
    digest = hashlib.sha256()
    max_norm = {hook.layer: hook.max_norm for hook in watchlist.hooks}
    for clamp in watchlist.clamps:
        digest.update(repr((clamp.layer, clamp.columns, clamp.owner)).encode())
        digest.update(repr(max_norm[clamp.layer]).encode())
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
