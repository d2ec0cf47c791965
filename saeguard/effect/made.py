"""Feature sets made on the spot, for latents that no file names yet."""

from __future__ import annotations

from pathlib import Path

from saeguard.effect.arms import new_feature
from saeguard.errors import InputError
from saeguard.features.load import load_feature_set
from saeguard.features.model_fit import read_shape
from saeguard.features.types import Feature, FeatureSet, ModelRef, SaeRef
from saeguard.hf.model import load_tokenizer
from saeguard.sae import inspect


def feature_to_clamp(
    model: Path, set_: Path | None, name: str | None, sae: Path | None, latents: str | None
) -> tuple[FeatureSet, Feature]:
    """Return the feature whose clamp latents are edited, and its set.

    Args:
        model: folder of the model.
        set_: a feature-set file, or None if `sae` is given.
        name: a feature of the set, or None if `latents` is given.
        sae: folder of an SAE.
        latents: with weights, as `parse_latents` reads them.

    Raises:
        InputError: neither or both are given, or there is nothing to clamp.
    """
    if (set_ is None) == (sae is None) or (name is None) == (latents is None):
        raise InputError("give --set or --sae, and --feature or --latents")
    features = load_feature_set(set_) if set_ is not None else set_of_sae(sae or Path(), model)
    if features.sae is None:
        raise InputError(f"{set_}: holds probes without an SAE; a clamp edits latents of an SAE")
    if latents is not None:
        return features, new_feature(parse_latents(latents, features.sae.d_sae))
    found = features.features.get(name or "")
    if found is None or not found.clamp:
        able = sorted(n for n, f in features.features.items() if f.clamp)
        raise InputError(
            f"--feature: found {name!r}; expected a feature with clamp latents: "
            f"{', '.join(able) or 'this set has none; give --latents'}"
        )
    return features, found


def set_of_sae(sae: Path, model: Path) -> FeatureSet:
    """Return a feature set without features on an SAE; the tokenizer's special tokens are excluded.

    Raises:
        SaeError: the checkpoint cannot be read.
        ModelError: there is no model.
    """
    info = inspect(sae)
    shape = read_shape(model)
    return FeatureSet(
        id="made",
        path=Path("made.yaml").absolute(),
        model=ModelRef(shape.name, shape.hidden_size, shape.num_layers),
        sae=SaeRef(info.path, info.sha256, info.layer, info.d_in, info.d_sae),
        features={},
        exclude_tokens=tuple(sorted(load_tokenizer(model).all_special_ids)),
        digest="",
    )


def parse_latents(text: str, d_sae: int) -> dict[int, float]:
    """Return latents with their weights, written `12:1,55:0.5`; a weight is 1 if left out.

    Raises:
        InputError: it is not of that form, or a latent does not exist.
    """
    found: dict[int, float] = {}
    for part in text.split(","):
        latent, _, weight = part.strip().partition(":")
        try:
            number, value = int(latent), float(weight or 1)
        except ValueError:
            raise InputError(
                f"--latents: found {part!r}; expected latents with weights, such as 12:1,55:0.5"
            ) from None
        if not 0 <= number < d_sae or number in found:
            raise InputError(
                f"--latents: found {number}; expected different numbers from 0 to {d_sae - 1}"
            )
        found[number] = value
    return found
