"""Load and save feature sets."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from saeguard.atomic_files import staged
from saeguard.features.files import FeatureSetError, read_with_positions
from saeguard.features.massive import MeasuredNorms, norms_as_plain
from saeguard.features.pins import verify_pins
from saeguard.features.schema import (
    SCHEMA,
    FeaturePart,
    FeatureSetFile,
    ModelPart,
    NormsPart,
    SaePart,
    layers_read,
)
from saeguard.features.topk_thresholds import approximation, as_plain
from saeguard.features.types import (
    Feature,
    FeatureSet,
    MeasuredDrift,
    ModelRef,
    ProbeRef,
    SaeRef,
    Term,
)
from saeguard.real_path import real_path
from saeguard.sae import SaeError, Stated
from saeguard.sae.hub import HubRef, commit_of, fetch, named
from saeguard.yaml_files.reader import Document
from saeguard.yaml_files.writer import as_yaml

__all__ = ["FeatureSetError", "load_feature_set", "save_feature_set"]


def load_feature_set(
    path: str | Path, *, verify: bool = True, unfinished: bool = False
) -> FeatureSet:
    """Load the feature set in the file at `path`.

    Args:
        path: a YAML file of schema `saeguard.features/v1`.
        verify: compare the SAE and the probes with what the file pins.
        unfinished: accept a set that is still to be calibrated; ranges and thresholds that it
            lacks are NaN.

    Raises:
        FeatureSetError: the file is wrong, or a checkpoint is not the one it was made for; then
            the message holds both values.
    """
    file = real_path(path)
    content, document = read_with_positions(file, unfinished=unfinished)
    features = FeatureSet(
        id=content.id,
        path=file,
        model=_model(content.model),
        sae=_sae(file, content, document, reach=verify),
        features={
            name: _feature(file, name, part, content.sae) for name, part in content.features.items()
        },
        exclude_tokens=tuple(content.exclude_tokens),
        digest=_digest(content),
        title=content.title,
        status=content.status,
        max_norm=content.max_norm or {},
        norms=_norms(content.norms_measured),
    )
    if verify:
        verify_pins(features, document)
    return features


def save_feature_set(features: FeatureSet, path: str | Path) -> None:
    """Write `features` to `path` by rename, with the paths in it relative to the file.

    Raises:
        FeatureSetError: it could not be loaded again.
    """
    file = real_path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    text = as_yaml(_plain(features, file.parent))
    with staged(file, text) as part:
        read_with_positions(part, unfinished=not features.calibrated)
        part.replace(file)


def _beside(file: Path, path: str) -> Path:
    return real_path(file.parent / path)


def _sae(file: Path, content: FeatureSetFile, document: Document, *, reach: bool) -> SaeRef | None:
    """Return the reference to an SAE, with its release or repository resolved to a folder."""
    part = content.sae
    if part is None:
        return None
    if part.path is not None:
        path, name = _beside(file, part.path), None
    else:
        keys = ("release", "id", "repo", "folder", "files", "revision")
        name = {k: v for k in keys if (v := getattr(part, k)) is not None}
        try:
            ref = hub_ref(part)
            path = fetch(ref) if reach else ref.converted
        except SaeError as error:
            finding = document.error("no-checkpoint", f"the SAE was not found: {error}", ("sae",))
            raise FeatureSetError([finding]) from error
    return SaeRef(
        path=path,
        sha256=part.sha256,
        layer=part.layer,
        d_in=part.d_in,
        d_sae=part.d_sae,
        stated=Stated(k=part.k, norm_factor=part.norm_factor, convention=part.convention),
        config_sha256=part.config_sha256,
        name=name,
        approximation=None if part.topk_measured is None else approximation(part.topk_measured),
    )


def sae_of(features: FeatureSet) -> SaeRef:
    """Return the SAE of a feature set, for what cannot be done without one.

    Raises:
        SaeError: the set has none.
    """
    if features.sae is None:
        raise SaeError(
            f"{features.path}: the set holds probes alone, and this needs an SAE; give a feature "
            "set with the key sae"
        )
    return features.sae


def pin(ref: SaeRef) -> SaeRef:
    """Return `ref` with the digests, and the commit, of the checkpoint that lies there now."""
    info = ref.inspect()
    name, commit = ref.name, commit_of(ref.path)
    if name is not None and commit is not None:
        name = {**name, "revision": commit}
    return replace(ref, sha256=info.sha256, config_sha256=info.config_sha256, name=name)


def hub_ref(part: SaePart) -> HubRef:
    """Return the repository and files of a named SAE.

    Raises:
        SaeError: the release or the id is not known.
    """
    if part.release is not None and part.id is not None:
        return named(part.release, part.id, part.revision)
    assert part.repo is not None
    assert part.files is not None
    return HubRef(part.repo, part.folder or "", tuple(part.files), part.revision or "main")


def _model(part: ModelPart) -> ModelRef:
    drift = (part.drift or {}).items()
    return ModelRef(
        **part.model_dump(exclude={"drift"}),
        drift=tuple((served, MeasuredDrift(**found.model_dump())) for served, found in drift),
    )


def _norms(parts: Mapping[int, NormsPart] | None) -> dict[int, MeasuredNorms]:
    return {layer: MeasuredNorms(**part.model_dump()) for layer, part in (parts or {}).items()}


def _terms(weights: Mapping[int, float] | None) -> tuple[Term, ...]:
    return tuple(Term(latent, weight) for latent, weight in (weights or {}).items())


def _feature(file: Path, name: str, part: FeaturePart, sae: SaePart | None) -> Feature:
    probe = None
    if part.probe is not None:
        at = _beside(file, part.probe.file)
        layers = layers_read(part.probe, sae)
        probe = ProbeRef(at, part.probe.name, part.probe.sha256, layers)
    return Feature(
        id=name,
        title=part.title,
        behaviour=part.behaviour,
        detect=_terms(part.detect),
        probe=probe,
        clamp=_terms(part.clamp),
        low=part.low,
        high=part.high,
        threshold=part.threshold,
        evidence=part.evidence,
    )


def _digest(content: FeatureSetFile) -> str:
    plain = content.model_dump(mode="json", by_alias=True)
    # Older files without these keys keep their digest.
    if content.sae is not None and content.sae.topk == "exact":
        del plain["sae"]["topk"], plain["sae"]["topk_measured"]
    for feature in plain["features"].values():
        if feature["probe"] is not None:
            feature["probe"] = {k: v for k, v in feature["probe"].items() if v is not None}
    for part, key in (
        (plain, "max_norm"),
        (plain, "norms_measured"),
        (plain["model"], "dtype"),
        (plain["model"], "quantization"),
        (plain["model"], "drift"),
    ):
        if part[key] is None:
            del part[key]
    canonical = json.dumps(plain, sort_keys=True)
    return hashlib.sha256(canonical.encode()).hexdigest()


def _plain(features: FeatureSet, folder: Path) -> dict[str, Any]:
    def relative(path: Path) -> str:
        return Path(os.path.relpath(path, folder)).as_posix()

    def weights(terms: tuple[Term, ...]) -> dict[int, float]:
        return {term.latent: float(term.weight) for term in terms}

    def probe(ref: ProbeRef) -> dict[str, Any]:
        layers = ref.layers
        named: dict[str, Any] = {"layers": list(layers)}
        if len(layers) == 1:
            given = features.sae is not None and layers == (features.sae.layer,)
            named = {} if given else {"layer": layers[0]}
        return {"file": relative(ref.path), "name": ref.name, "sha256": ref.sha256, **named}

    def feature(f: Feature) -> dict[str, Any]:
        read = {"detect": weights(f.detect)} if f.probe is None else {"probe": probe(f.probe)}
        return {
            "title": f.title,
            "behaviour": f.behaviour,
            **read,
            **({"clamp": weights(f.clamp)} if f.clamp else {}),
            **{
                key: float(value)
                for key in ("low", "high", "threshold")
                if not math.isnan(value := getattr(f, key))
            },
            **({"evidence": dict(f.evidence)} if f.evidence else {}),
        }

    def checkpoint(sae: SaeRef) -> dict[str, Any]:
        measured = sae.approximation
        return {
            **(sae.name or {"path": relative(sae.path)}),
            **({"sha256": sae.sha256} if sae.sha256 else {}),
            **({"config_sha256": sae.config_sha256} if sae.config_sha256 else {}),
            "layer": sae.layer,
            "d_in": sae.d_in,
            "d_sae": sae.d_sae,
            **{
                key: value
                for key in ("k", "norm_factor", "convention")
                if (value := getattr(sae.stated, key)) is not None
            },
            **({"topk": "approximate", "topk_measured": as_plain(measured)} if measured else {}),
        }

    model = features.model
    return {
        "schema": SCHEMA,
        "id": features.id,
        "title": features.title or features.id,
        **({"status": features.status} if features.status != "calibrated" else {}),
        "model": {
            "name": model.name,
            "hidden_size": model.hidden_size,
            "num_layers": model.num_layers,
            **{
                key: value
                for key in ("sha256", "dtype", "quantization")
                if (value := getattr(model, key)) is not None
            },
            **({"drift": {how: d._asdict() for how, d in model.drift}} if model.drift else {}),
        },
        **({} if features.sae is None else {"sae": checkpoint(features.sae)}),
        "exclude_tokens": list(features.exclude_tokens),
        **({"max_norm": dict(features.max_norm)} if features.max_norm else {}),
        **({"norms_measured": norms_as_plain(features.norms)} if features.norms else {}),
        "features": {name: feature(f) for name, f in features.features.items()},
    }
