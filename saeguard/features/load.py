"""Load and save feature sets."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from saeguard.features.schema import SCHEMA, Document, FeaturePart, FeatureSetError, read_document
from saeguard.features.types import Feature, FeatureSet, ModelRef, ProbeRef, SaeRef, Term
from saeguard.sae import SaeError

__all__ = ["FeatureSetError", "load_feature_set", "save_feature_set"]


def load_feature_set(path: str | Path, *, verify: bool = True) -> FeatureSet:
    """Load the feature set in the file at `path`.

    Args:
        path: a YAML file of schema `saeguard.features/v1`.
        verify: compare the SAE and the probes with what the file pins.

    Raises:
        FeatureSetError: the file is malformed, or a checkpoint is not the one it was made for;
            then both values are told.
    """
    file = Path(path).resolve()
    document = read_document(file)
    features = FeatureSet(
        id=document.id,
        path=file,
        model=ModelRef(**document.model.model_dump()),
        sae=SaeRef(**document.sae.model_dump() | {"path": _beside(file, document.sae.path)}),
        features={name: _feature(file, name, part) for name, part in document.features.items()},
        exclude_tokens=tuple(document.exclude_tokens),
        digest=_digest(document),
        title=document.title,
    )
    if verify:
        _verify(features)
    return features


def save_feature_set(features: FeatureSet, path: str | Path) -> None:
    """Write `features` to `path` by rename, with the paths in it relative to the file.

    Raises:
        FeatureSetError: it could not be loaded again.
    """
    file = Path(path).resolve()
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(file.name + ".part")
    text = yaml.safe_dump(_plain(features, file.parent), sort_keys=False, allow_unicode=True)
    part.write_text(text, encoding="utf-8")
    try:
        read_document(part)
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)


def file_digest(path: Path) -> str:
    """Return the sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _beside(file: Path, path: str) -> Path:
    return (file.parent / path).resolve()


def _terms(weights: Mapping[int, float] | None) -> tuple[Term, ...]:
    return tuple(Term(latent, weight) for latent, weight in (weights or {}).items())


def _feature(file: Path, name: str, part: FeaturePart) -> Feature:
    probe = None
    if part.probe is not None:
        at = _beside(file, part.probe.file)
        probe = ProbeRef(at, part.probe.name, part.probe.sha256)
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


def _digest(document: Document) -> str:
    canonical = json.dumps(document.model_dump(mode="json", by_alias=True), sort_keys=True)
    return hashlib.sha256(canonical.encode()).hexdigest()


def _verify(features: FeatureSet) -> None:
    pinned = features.sae
    try:
        found = pinned.inspect()
    except SaeError as error:
        raise FeatureSetError(f"{features.path}: sae.path: {error}") from error
    for key in ("layer", "d_in", "d_sae", "sha256"):
        if getattr(pinned, key) != getattr(found, key):
            raise FeatureSetError(
                f"{features.path}: sae.{key} is {getattr(pinned, key)}, but {found.path} has "
                f"{getattr(found, key)}; the features hold only for the checkpoint they were "
                "found in"
            )
    for feature in features.features.values():
        if feature.probe is None:
            continue
        try:
            digest = file_digest(feature.probe.path)
        except OSError as error:
            raise FeatureSetError(
                f"{features.path}: features.{feature.id}.probe.file: {error}"
            ) from error
        if digest != feature.probe.sha256:
            raise FeatureSetError(
                f"{features.path}: features.{feature.id}.probe.sha256 is {feature.probe.sha256}, "
                f"but {feature.probe.path} has {digest}"
            )


def _plain(features: FeatureSet, folder: Path) -> dict[str, Any]:
    def relative(path: Path) -> str:
        return Path(os.path.relpath(path, folder)).as_posix()

    def weights(terms: tuple[Term, ...]) -> dict[int, float]:
        return {term.latent: float(term.weight) for term in terms}

    def feature(f: Feature) -> dict[str, Any]:
        read: dict[str, Any] = {"detect": weights(f.detect)}
        if f.probe is not None:
            file = relative(f.probe.path)
            read = {"probe": {"file": file, "name": f.probe.name, "sha256": f.probe.sha256}}
        return {
            "title": f.title,
            "behaviour": f.behaviour,
            **read,
            **({"clamp": weights(f.clamp)} if f.clamp else {}),
            "low": float(f.low),
            "high": float(f.high),
            "threshold": float(f.threshold),
            **({"evidence": dict(f.evidence)} if f.evidence else {}),
        }

    model, sae = features.model, features.sae
    return {
        "schema": SCHEMA,
        "id": features.id,
        "title": features.title or features.id,
        "model": {
            "name": model.name,
            "hidden_size": model.hidden_size,
            "num_layers": model.num_layers,
            **({"sha256": model.sha256} if model.sha256 else {}),
        },
        "sae": {
            "path": relative(sae.path),
            "sha256": sae.sha256,
            "layer": sae.layer,
            "d_in": sae.d_in,
            "d_sae": sae.d_sae,
        },
        "exclude_tokens": list(features.exclude_tokens),
        "features": {name: feature(f) for name, f in features.features.items()},
    }
