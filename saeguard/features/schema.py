"""The models of a feature-set file, `saeguard.features/v1`."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import Field

from saeguard.yaml_files.section import FORMS, Section

SCHEMA = "saeguard.features/v1"
SHA256 = r"^[0-9a-f]{64}$"
COMMIT = r"^[0-9a-f]{40}$"
NAME = r"^[a-z][a-z0-9_]*$"
SET_ID = r"^[a-z0-9][a-z0-9_.-]*(/[a-z0-9][a-z0-9_.-]*)*$"
REPOSITORY = r"^[\w.-]+/[\w.-]+$"
FOLDER = r"^[\w.-]+(/[\w.-]+)*$"

FORMS.update(
    {
        SHA256: "64 hexadecimal digits, as `sha256sum` prints them",
        COMMIT: "40 hexadecimal digits, a commit of the repository",
        NAME: "a lower-case letter, then letters, digits and _, such as shell_command",
        SET_ID: "the file's path below the feature set folder, without its .yaml",
        REPOSITORY: "OWNER/NAME, as the Hugging Face hub names the repository",
        FOLDER: "a folder of the repository, such as layer_12/width_16k",
    }
)

Digest = Annotated[str, Field(pattern=SHA256)]
Latent = Annotated[int, Field(ge=0)]
Layer = Annotated[int, Field(ge=0)]
Weight = Annotated[float, Field(description="Factor of the latent's activation.")]
Name = Annotated[str, Field(pattern=NAME, max_length=100)]


class DriftPart(Section):
    """What `saeguard features drift` measured; not to be written by hand."""

    tokens: int = Field(gt=0, description="Tokens compared, of the same texts.")
    p99: float = Field(ge=0, description="99 % of any feature's shares moved by less.")
    highest: float = Field(ge=0, description="The share that moved most, moved by this much.")
    fired: int = Field(ge=0, description="Shares above their feature's threshold before.")
    lost: int = Field(ge=0, description="Of these, those not above it afterwards.")
    gained: int = Field(ge=0, description="Shares above it afterwards only.")


class ModelPart(Section):
    """The model the features hold for."""

    name: str = Field(min_length=1)
    hidden_size: int = Field(gt=0)
    num_layers: int = Field(gt=0)
    sha256: Digest | None = Field(default=None, description="Of its weights, all files together.")
    dtype: Literal["float32", "bfloat16", "float16"] | None = Field(
        default=None, description="Of the weights that the set was calibrated with."
    )
    quantization: str | None = Field(
        default=None, max_length=100, description="Of these weights, as in the model's config.json."
    )
    drift: dict[str, DriftPart] | None = Field(
        default=None,
        description="How far features move, by the arithmetic of serving, such as float32.",
    )


class RatePart(Section):
    """A measured rate of tokens, with its exact 95 % interval."""

    rate: float = Field(ge=0, le=1)
    interval: list[float] = Field(min_length=2, max_length=2)
    hits: int = Field(ge=0)
    tokens: int = Field(gt=0)


class StandInPart(Section):
    """A threshold that stands for one latent's rank."""

    threshold: float
    precision: RatePart = Field(description="Of the tokens above it, those in the top k.")
    recall: RatePart = Field(description="Of the tokens in the top k, those above it.")


class MeasuredPart(Section):
    """What `saeguard features calibrate --topk approximate` measured; not to be written by hand."""

    k: int = Field(gt=0)
    sha256: Digest = Field(description="Of the weight file it was measured with.")
    texts_sha256: Digest = Field(description="Of the token ids it was measured on.")
    texts: int = Field(gt=0)
    tokens: int = Field(gt=0)
    latents: dict[Latent, StandInPart] = Field(min_length=1)


class SaePart(Section):
    """The checkpoint the latents are numbered in: a path, a release and id, or a repository."""

    path: str | None = Field(
        default=None, min_length=1, description="Folder, relative to this file or absolute."
    )
    release: str | None = Field(default=None, description="As SAELens names it.")
    id: str | None = Field(default=None, description="Of one SAE of the release.")
    repo: str | None = Field(
        default=None,
        pattern=REPOSITORY,
        description="Repository of the Hugging Face hub.",
    )
    folder: str | None = Field(
        default=None,
        pattern=FOLDER,
        description="Of one SAE within the repository.",
    )
    files: list[str] | None = Field(
        default=None, min_length=1, description="Within the folder, the weights first."
    )
    revision: str | None = Field(
        default=None, pattern=COMMIT, description="Commit of the repository."
    )
    sha256: Digest | None = Field(default=None, description="Of the weight file.")
    config_sha256: Digest | None = Field(default=None, description="Of the file beside it.")
    layer: int = Field(ge=0)
    d_in: int = Field(gt=0)
    d_sae: int = Field(gt=0)
    k: int | None = Field(default=None, gt=0, description="If the files do not say it.")
    norm_factor: float | None = Field(
        default=None, gt=0, description="Of `expected_average_only_in`, not in the files."
    )
    convention: Literal["openmoss", "saelens"] | None = Field(
        default=None, description="Reading of Llama Scope."
    )
    topk: Literal["exact", "approximate"] = Field(
        default="exact",
        description="approximate: measured thresholds stand for the ranks of a TopK SAE's latents.",
    )
    topk_measured: MeasuredPart | None = Field(
        default=None, description="Those thresholds, and how well they agree with ranks."
    )


class ProbePart(Section):
    """A linear probe on the residual stream after one or several layers."""

    file: str = Field(min_length=1, description="Relative to this file or absolute.")
    name: str = Field(min_length=1)
    sha256: Digest
    layer: int | None = Field(
        default=None, ge=0, description="The layer it reads. Default: the SAE's, if there is one."
    )
    layers: list[Annotated[int, Field(ge=0)]] | None = Field(
        default=None,
        min_length=1,
        description="In place of layer: several, in ascending order, one row of weights each.",
    )


class NormsPart(Section):
    """What `saeguard features calibrate` measured of a layer's norms; not to be written by hand."""

    median: float = Field(gt=0)
    tokens: int = Field(gt=0, description="Of the texts, special tokens left out.")
    massive: int = Field(ge=0, description="Of these, those above the bound of that time.")
    kept_highest: float = Field(ge=0, description="Highest norm of the others.")
    lowest: float | None = Field(default=None, description="Lowest norm above the bound.")
    highest: float | None = None
    positions: dict[Annotated[int, Field(ge=0)], Annotated[int, Field(gt=0)]] | None = Field(
        default=None, description="Tokens above the bound, by their position in the text."
    )


class FeaturePart(Section):
    """One feature."""

    title: str = Field(min_length=1)
    behaviour: str = Field(min_length=1)
    detect: dict[Latent, Weight] | None = Field(default=None, min_length=1)
    probe: ProbePart | None = None
    clamp: dict[Latent, Weight] = Field(default_factory=dict)
    low: float = Field(default=math.nan, description="Value at share 0; `calibrate` finds it.")
    high: float = Field(default=math.nan, description="Value at share 1; `calibrate` finds it.")
    threshold: float = Field(default=math.nan, gt=0, description="A share; `calibrate` finds it.")
    evidence: dict[str, Any] = Field(default_factory=dict)


class FeatureSetFile(Section):
    """A feature-set file."""

    schema_: Literal["saeguard.features/v1"] = Field(alias="schema")
    id: str = Field(pattern=SET_ID, max_length=200)
    title: str = Field(min_length=1)
    status: Literal["calibrated", "published"] = Field(
        default="calibrated",
        description="published: ids from a publication, not verified here; for logging only.",
    )
    model: ModelPart
    sae: SaePart | None = Field(
        default=None, description="Left out if every feature is a probe with layers of its own."
    )
    exclude_tokens: list[Annotated[int, Field(ge=0)]] = Field(default_factory=list)
    max_norm: dict[Layer, Annotated[float, Field(gt=0, allow_inf_nan=False)]] | None = Field(
        default=None,
        min_length=1,
        description="By layer: tokens whose residual has a larger norm there are left out.",
    )
    norms_measured: dict[Layer, NormsPart] | None = Field(
        default=None, min_length=1, description="By layer: what the bound was measured from."
    )
    features: dict[Name, FeaturePart] = Field(min_length=1)


def layers_of(document: FeatureSetFile, feature: str) -> tuple[int, ...]:
    """Return the layers that a feature reads."""
    part = document.features[feature]
    if part.probe is not None:
        return layers_read(part.probe, document.sae)
    return () if document.sae is None else (document.sae.layer,)


def layers_read(probe: ProbePart, sae: SaePart | None) -> tuple[int, ...]:
    """Return the layers that a probe reads: those that it names, or the SAE's."""
    if probe.layers is not None:
        return tuple(probe.layers)
    layer = sae.layer if probe.layer is None and sae is not None else probe.layer
    return () if layer is None else (layer,)
