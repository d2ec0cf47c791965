"""From what a search found to a feature of a feature set, with its evidence."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from saeguard.errors import InputError
from saeguard.features.load import load_feature_set
from saeguard.features.model_fit import ModelShape, sae_misfit
from saeguard.features.model_identity import read_quantization, weights_sha256
from saeguard.features.probe import save_probes
from saeguard.features.search import Finding, Search
from saeguard.features.types import Feature, FeatureSet, ModelRef, SaeRef
from saeguard.features.weakness import no_better_than_chance, no_better_than_random
from saeguard.real_path import real_path
from saeguard.sae import SaeInfo

Form = Literal["best", "probe", "group", "latent"]
READABLE = 0.02
"""AUROC, in validation, that a group of latents may lack against the probe and still be best: a
person can read a group, and clamp it."""
FEATURE_SETS = "feature_sets"
"""The usual name of the folder below which policies name feature sets."""


class FoundError(InputError):
    """What was found cannot be written into a feature set."""


def choose(found: Search, form: Form) -> Finding:
    """Return the detector of one form, or the best one; validation decides, not the hold-out.

    Raises:
        FoundError: there is none of that form, for want of an SAE.
    """
    if form == "probe" or (form == "best" and found.group is None):
        return found.probe
    if found.group is None:
        raise FoundError(f"--form {form} needs an SAE; give --sae, or --form probe")
    if form == "latent":
        return found.latents[0]
    group, probe = found.group.auroc_validation or 0.0, found.probe.auroc_validation or 0.0
    return found.group if form == "group" or group >= probe - READABLE else found.probe


def evidence_of(found: Search, chosen: Finding, scope: str, kind: str | None) -> dict[str, Any]:
    """Return what a search tells of a detector, for the feature's evidence."""
    compared = {"probe": found.probe}
    if found.group is not None:
        compared["group"] = found.group
        compared["latent"], compared["random_group"] = found.latents[0], found.controls[0]
    return {
        "scope": scope,
        **({"kind": kind} if kind else {}),
        "form": chosen.form + (f": {chosen.note}" if chosen.note else ""),
        "window": chosen.reading.words,
        "holdout": _area(chosen),
        "compared": {name: _area(finding) for name, finding in compared.items()},
    }


def useless(evidence: dict[str, Any]) -> str:
    """Return why a search found nothing, empty if it found something."""
    return no_better_than_chance(evidence) or no_better_than_random(evidence)


def _area(finding: Finding) -> dict[str, Any]:
    low, high = finding.interval
    return {
        "auroc": round(finding.auroc_holdout, 4),
        "interval": [round(low, 4), round(high, 4)],
    }


def new_set(
    path: Path,
    shape: ModelShape,
    folder: Path,
    info: SaeInfo | None,
    exclude: tuple[int, ...],
    *,
    dtype: str | None = None,
) -> FeatureSet:
    """Return a feature set without features, with the sizes and digests of model and SAE.

    Args:
        path: of its file.
        shape: of the model.
        folder: of the model, whose weights are pinned.
        info: the SAE, if there is one.
        exclude: token ids that are not evaluated.
        dtype: of the weights that the model is read with.

    Raises:
        FoundError: the SAE does not read this model's residual stream.
    """
    misfit = "" if info is None else sae_misfit(info.d_in, info.layer, shape)
    if info is not None and misfit:
        raise FoundError(f"{info.path}: {misfit}")
    parents = [parent.name for parent in real_path(path).parents]
    below = parents.index(FEATURE_SETS) if FEATURE_SETS in parents else 0
    name = "/".join([*reversed(parents[:below]), path.stem])
    return FeatureSet(
        id=name,
        path=real_path(path),
        model=ModelRef(
            shape.name,
            shape.hidden_size,
            shape.num_layers,
            sha256=weights_sha256(folder),
            dtype=dtype,
            quantization=read_quantization(folder),
        ),
        sae=None if info is None else _sae(info),
        features={},
        exclude_tokens=exclude,
        digest="",
        title=f"Features of {shape.name}",
    )


def _sae(info: SaeInfo) -> SaeRef:
    return SaeRef(
        real_path(info.path),
        info.sha256,
        info.layer,
        info.d_in,
        info.d_sae,
        config_sha256=info.config_sha256,
    )


def set_at(new: FeatureSet) -> FeatureSet:
    """Return the feature set in a new set's file, or the new set if there is no such file.

    Raises:
        FeatureSetError: the file is wrong.
        FoundError: it is for another model or SAE; names both values.
    """
    if not new.path.exists():
        return new
    old = load_feature_set(new.path, unfinished=True)
    pairs = [
        ("model.sha256", old.model.sha256, new.model.sha256),
        ("model.hidden_size", old.model.hidden_size, new.model.hidden_size),
        ("model.num_layers", old.model.num_layers, new.model.num_layers),
        ("model.dtype", old.model.dtype, new.model.dtype),
        ("sae.sha256", old.sae and old.sae.sha256, new.sae and new.sae.sha256),
        ("sae.layer", old.sae and old.sae.layer, new.sae and new.sae.layer),
    ]
    for key, known, found in pairs:
        if None not in (known, found) and known != found:
            raise FoundError(
                f"{new.path}: {key} is {known}, but this search read {found}; write the feature "
                "to another file"
            )
    return replace(old, sae=old.sae or new.sae)


def with_found(
    features: FeatureSet,
    name: str,
    title: str,
    behaviour: str,
    chosen: Finding,
    evidence: dict[str, Any],
) -> FeatureSet:
    """Return a set with a detector as one more feature, still to be calibrated.

    A probe's weights are written to a file of its own in the folder `NAME.probes` beside the set.
    A feature of that name is replaced.
    """
    ref = None
    if chosen.probe is not None:
        beside = features.path.with_suffix(".probes") / f"{name}.safetensors"
        ref = save_probes({name: chosen.probe}, beside)[name]
    feature = Feature(
        id=name,
        title=title,
        behaviour=behaviour,
        detect=chosen.terms,
        probe=ref,
        clamp=(),
        low=math.nan,
        high=math.nan,
        threshold=math.nan,
        evidence=evidence,
    )
    return replace(features, features={**features.features, name: feature})


def feature_name(*parts: str | None) -> str:
    """Return a name that a feature may have, from words such as a behaviour and a kind."""
    words = "_".join(part for part in parts if part)
    name = re.sub(r"[^a-z0-9]+", "_", words.lower()).strip("_")
    return name if name[:1].isalpha() else f"f_{name}"
