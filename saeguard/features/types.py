"""Feature sets in memory: named directions in the residual stream of one model, with evidence."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from saeguard.features.massive import MeasuredNorms
from saeguard.features.topk_thresholds import Approximation
from saeguard.sae import SaeInfo, Stated, inspect
from saeguard.sae.checkpoint_info import thresholds_for_ranks


class MeasuredDrift(NamedTuple):
    """How far a set's features move under other arithmetic than that of its calibration."""

    tokens: int
    """Tokens compared, of the same texts."""
    p99: float
    """99 % of any feature's shares moved by less."""
    highest: float
    """How far the share that moved most has moved."""
    fired: int
    """Shares above their feature's threshold under the arithmetic of the calibration."""
    lost: int
    """Of these, those not above it under the other."""
    gained: int
    """Shares above it under the other only."""

    @property
    def in_words(self) -> str:
        """Return what moved, for a log."""
        return (
            f"of {self.tokens} tokens, 99 % of any feature's shares moved by less than "
            f"{self.p99:.2g}, one by {self.highest:.2g}; of {self.fired} above their threshold "
            f"{self.lost} fell below, and {self.gained} rose above"
        )


@dataclass(frozen=True, slots=True)
class ModelRef:
    """The model a feature set holds for; a mismatch refuses to load."""

    name: str
    hidden_size: int
    num_layers: int
    sha256: str | None = None
    """Digest of its weights, None if the feature set does not pin them."""
    dtype: str | None = None
    """Type of the weights that the ranges and thresholds were measured under; None if unknown."""
    quantization: str | None = None
    """How these weights were quantised, in the words of the model's configuration."""
    drift: tuple[tuple[str, MeasuredDrift], ...] = ()
    """By other `arithmetic`: what it changes, as far as that was measured."""

    @property
    def arithmetic(self) -> str:
        """Type and quantisation in words, such as `float32` or `bfloat16, quantised: awq`."""
        how = f", quantised: {self.quantization}" if self.quantization else ""
        return f"{self.dtype or 'an unknown type'}{how}"


@dataclass(frozen=True, slots=True)
class SaeRef:
    """One SAE checkpoint and the hook point it reads."""

    path: Path
    """Directory of the checkpoint, absolute."""
    sha256: str | None
    """Digest of the weight file. None: not pinned yet, which only a published set may be."""
    layer: int
    """`resid_post` of this block: HF `hidden_states[layer + 1]`."""
    d_in: int
    d_sae: int
    stated: Stated = field(default_factory=Stated)
    """Facts of the checkpoint that its files do not hold but the feature set does."""
    config_sha256: str | None = None
    """Digest of the configuration, None if it is not pinned."""
    name: Mapping[str, Any] | None = None
    """Release and id, or repository and files, as the file has them; None if it has a path."""
    approximation: Approximation | None = None
    """Thresholds that replace the ranks of a TopK SAE's latents; None: they are ranked exactly."""

    def inspect(self) -> SaeInfo:
        """Read the checkpoint's headers.

        Raises:
            SaeError: it is not there, or cannot be read rightly.
        """
        info = inspect(self.path, replace(self.stated, layer=self.layer))
        if self.approximation is None:
            return info
        stand_ins = {n: x.threshold for n, x in self.approximation.latents.items()}
        return thresholds_for_ranks(info, self.approximation.k, stand_ins)


@dataclass(frozen=True, slots=True)
class Term:
    """One latent's share in a feature: `weight * f[latent]`."""

    latent: int
    weight: float


@dataclass(frozen=True, slots=True)
class ProbeRef:
    """A linear probe, `sum(x_l @ w_l) + b` over its layers: one more encoder row at each of them.

    These rows have no activation function.
    """

    path: Path
    """safetensors file holding `{name}.weight` and `{name}.bias []`, absolute. The weight is
    [d_in], or [layers, d_in] for several layers."""
    name: str
    sha256: str
    layers: tuple[int, ...]
    """`resid_post` of these blocks, in ascending order."""


@dataclass(frozen=True, slots=True)
class Feature:
    """A named weighted group of latents, or a linear probe.

    The value at a token is `v = sum(weight * f)` (or the probe's logit). Policies compare
    the *share* `(v - low) / (high - low)` of the calibrated range, so that 0 is quiet and
    1 is as strong as the calibration texts showed. Range and threshold are NaN until
    calibration has set them.
    """

    id: str
    title: str
    behaviour: str
    detect: tuple[Term, ...]
    probe: ProbeRef | None
    clamp: tuple[Term, ...]
    """Latents to edit when a policy clamps this feature; `weight` scales the target."""
    low: float
    high: float
    threshold: float
    """Share above which the feature holds the calibrated false-positive rate."""
    evidence: Mapping[str, Any]
    """AUROC, intervals, rates, snippets. The guard never reads them."""


@dataclass(frozen=True, slots=True)
class FeatureSet:
    """The features of one model: of an SAE, if there is one, and probes on any of its layers."""

    id: str
    path: Path
    model: ModelRef
    sae: SaeRef | None
    """None if every feature is a probe."""
    features: Mapping[str, Feature]
    exclude_tokens: tuple[int, ...]
    """Token ids never evaluated (BOS, padding); counted as `special_token`."""
    digest: str
    """sha256 of the file's canonical content, so that comments and layout do not matter."""
    title: str = ""
    status: Literal["calibrated", "published"] = "calibrated"
    """published: ids from a publication, never measured here; they may log, not act."""
    max_norm: Mapping[int, float] = field(default_factory=dict)
    """By layer: tokens whose residual has a larger norm there are never evaluated; counted as
    `massive_norm`. A layer that is missing has no bound."""
    norms: Mapping[int, MeasuredNorms] = field(default_factory=dict)
    """By layer: what the bound was measured from."""

    def with_norms(
        self, bounds: Mapping[int, float], norms: Mapping[int, MeasuredNorms]
    ) -> FeatureSet:
        """Return the set with other bounds, and what they were measured from, by layer."""
        return replace(self, max_norm={**self.max_norm, **bounds}, norms={**self.norms, **norms})

    def layers_of(self, feature: Feature) -> tuple[int, ...]:
        """Return the layers that a feature reads, in ascending order."""
        if feature.probe is not None:
            return feature.probe.layers
        return () if self.sae is None else (self.sae.layer,)

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers that any of the features reads, in ascending order."""
        return tuple(sorted({x for f in self.features.values() for x in self.layers_of(f)}))

    @property
    def calibrated(self) -> bool:
        """Whether every feature has a range and a threshold."""
        return not any(
            math.isnan(number)
            for f in self.features.values()
            for number in (f.low, f.high, f.threshold)
        )
