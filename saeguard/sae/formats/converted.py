"""The format that `saeguard sae convert` writes: one row per latent, and its origin.

`saeguard_sae.json` holds the description that the source's own family module made, and the
provenance; `saeguard_sae.safetensors` the tensors as stored in the source, matrices with one row a
latent. Nothing is folded and no value rounded, so that a converted SAE is its source.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from saeguard.sae.checkpoint_info import Activation, Layout, Norm, Part, SaeInfo
from saeguard.sae.formats.source import Source, kept, sizes, stated_layer, wrong

SCHEMA = "saeguard.sae/v1"
CONFIG = "saeguard_sae.json"
WEIGHTS = "saeguard_sae.safetensors"

_Size = Annotated[int, Field(gt=0)]


class Provenance(BaseModel):
    """Where a converted checkpoint comes from."""

    model_config = ConfigDict(strict=True, extra="forbid")

    source: str
    """Name of the file that was read."""
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    """Its digest."""
    config_sha256: str | None = None
    """Of the configuration beside it."""
    revision: str | None = None
    """Of the repository, as stated."""
    converter: str
    """Version of saeguard."""
    operations: list[str]


class Document(BaseModel):
    """The configuration of a converted checkpoint."""

    model_config = ConfigDict(strict=True, extra="forbid", populate_by_name=True)

    schema_: Literal["saeguard.sae/v1"] = Field(alias="schema")
    format: str
    architecture: str
    layer: Annotated[int, Field(ge=0)]
    d_in: _Size
    d_sae: _Size
    activation: Activation
    k: _Size | None = None
    relu_after_topk: bool = True
    norm: Norm = "none"
    eps: Annotated[float, Field(ge=0)] = 0.0
    transcoder: bool = False
    model: str | None = None
    folded: list[str] = []
    layout: dict[str, Any]
    provenance: Provenance


def describe(source: Source) -> SaeInfo:
    """Return the description of a converted checkpoint.

    Raises:
        SaeError: it is damaged, or does not fit its description.
    """
    try:
        document = Document.model_validate(dict(source.config))
        layout: Layout = TypeAdapter(Layout).validate_python(document.layout)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        raise wrong(source, f"{field}: {first['msg']}, found {first['input']!r}"[:500]) from error
    of_latents = (layout.b_enc, layout.r_mag, layout.b_mag, layout.threshold)
    found = sizes(
        source,
        {layout.W_enc.name: "Nd"}
        | ({} if document.transcoder else {layout.W_dec.name: "Nd"})
        | {name: "N" for name in of_latents if isinstance(name, str)}
        | {name: "d" for name in (layout.subtract, layout.b_dec) if name is not None},
    )
    if layout.W_enc.axis or layout.W_dec.axis:
        raise wrong(source, "layout: a converted matrix has one row a latent, axis 0")
    for key in ("d_in", "d_sae"):
        if getattr(document, key) != getattr(found, key):
            raise wrong(
                source,
                f"{key} is {getattr(document, key)}, the tensors say {getattr(found, key)}",
            )
    if document.activation in {"topk", "groupmax"}:
        kept(source, document.k, found.d_sae)
    return SaeInfo(
        path=source.folder,
        weights=source.weights.path,
        config=source.config_file,
        dtype=found.dtype,
        layout=layout,
        folded=tuple(document.folded),
        **{
            key: getattr(document, key)
            for key in (
                "format", "architecture", "d_in", "d_sae", "activation", "k", "relu_after_topk",
                "norm", "eps", "transcoder", "model",
            )
        },
        layer=stated_layer(source, document.layer, ""),
    )  # fmt: skip


def document(info: SaeInfo, provenance: Provenance) -> dict[str, Any]:
    """Return the configuration of a converted `info`, whose matrices have one row a latent."""
    layout = replace(
        info.layout, W_enc=Part(info.layout.W_enc.name, 0), W_dec=Part(info.layout.W_dec.name, 0)
    )
    left_out = {"stand_ins", "path", "weights", "config", "dtype", "layout"}
    return {
        "schema": SCHEMA,
        **{key: value for key, value in _fields(info).items() if key not in left_out},
        "layout": asdict(layout),
        "provenance": provenance.model_dump(),
    }


def _fields(info: SaeInfo) -> dict[str, Any]:
    fields = asdict(info)
    return {k: list(v) if isinstance(v, tuple) else v for k, v in fields.items()}
